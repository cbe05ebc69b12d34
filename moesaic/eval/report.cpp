#include "moesaic/eval/report.h"

#include <ctime>

#include "moesaic/base/file_errors.h"
#include "moesaic/base/sha256.h"
#include "moesaic/eval/suite.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

/// `name` as a file name. "/" becomes "__"; leading dots and slashes go, they would hide the folder.
std::string sanitized(const std::string& path) {
  const std::string name = path.substr(std::min(path.find_first_not_of("./"), path.size()));
  std::string result;
  for (char c : name) {
    if (c == '/') {
      result += "__";
    } else {
      result += std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '-' || c == '_' || c == '+' ? c : '_';
    }
  }
  return result.empty() ? "model" : result;
}

/// 2026-11-22T17-05-09.123456, local time, as the harness names its files.
std::string file_time() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  std::tm parts{};
  localtime_r(&seconds, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H-%M-%S", &parts);
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(now.time_since_epoch()).count() % 1000000;
  return fmt::format("{}.{:06}", text, micros);
}

/// "N/A", as the harness writes it, where none is known.
OrderedJson error_json(double error) { return std::isnan(error) ? OrderedJson("N/A") : OrderedJson(error); }

/// A metric of ours as the harness has it: a metric and the filter before it.
std::pair<std::string, std::string> metric_and_filter(const std::string& metric) {
  const bool filter = metric == "flexible-extract" || metric == "remove_whitespace";
  return filter ? std::pair<std::string, std::string>("exact_match", metric) : std::pair(metric, std::string("none"));
}

OrderedJson metrics_json(const std::map<std::string, Mean>& metrics) {
  OrderedJson json = OrderedJson::object();
  for (const auto& [name, mean] : metrics) {
    const auto [metric, filter] = metric_and_filter(name);
    json[metric + "," + filter] = mean.value;
    json[metric + "_stderr," + filter] = error_json(mean.standard_error);
  }
  return json;
}

OrderedJson null_if_empty(const std::string& text) { return text.empty() ? OrderedJson(nullptr) : OrderedJson(text); }

}  // namespace

OrderedJson results_json(const std::vector<TaskResult>& results, const std::vector<Task>& tasks,
                         const EvalOptions& options, const RunInfo& info) {
  OrderedJson scores = OrderedJson::object(), subtasks = scores, configs = scores, versions = scores, shots = scores,
              higher = scores, samples = scores, variants = scores, ties = scores, routing = scores, hashes = scores;
  for (size_t i = 0; i < results.size(); ++i) {
    const TaskResult& result = results[i];
    const std::string& name = result.name;
    scores[name] = {{"alias", name}};
    scores[name].update(metrics_json(result.metrics));
    scores[name].update(metrics_json(result.corpus_metrics));
    for (const auto& [metric, value] : result.variant_median) scores[name][metric + "_template_median,none"] = value;
    subtasks[name] = OrderedJson::array();
    configs[name] = {{"task", name},
                     {"dataset_path", tasks[i].path.string()},
                     {"output_type", result.ranked ? "multiple_choice" : "generate_until"},
                     {"num_fewshot", tasks[i].num_fewshot},
                     {"repeats", 1}};
    if (result.ranked) {
      configs[name]["target_delimiter"] = delimiter_of(tasks[i], options);
      configs[name]["score_eos"] = options.score_eos || tasks[i].score_eos;
    } else {
      const generate::SamplingOptions sampling = sampling_of(tasks[i], options);
      configs[name]["generation_kwargs"] = {{"until", sampling.stop},
                                            {"max_gen_toks", sampling.max_new_tokens},
                                            {"do_sample", sampling.temperature > 0},
                                            {"temperature", sampling.temperature}};
      if (tasks[i].code()) configs[name]["unsafe_code"] = true;
    }
    versions[name] = tasks[i].version;
    shots[name] = tasks[i].num_fewshot;
    samples[name] = {{"original", result.available}, {"effective", result.questions}};
    for (const auto& [metric, mean] : result.metrics) higher[name][metric_and_filter(metric).first] = true;
    for (const auto& [metric, value] : result.corpus_metrics) higher[name][metric] = true;
    for (const auto& [variant, metrics] : result.variants) variants[name][variant] = metrics_json(metrics);
    if (result.ranked) ties[name] = result.ties;
    if (!result.routing.empty()) routing[name] = result.routing.json();
    Sha256 hash;
    for (const OrderedJson& sample : result.samples) hash.update(sample["doc_hash"].get<std::string>());
    hashes[name] = hash.hex();
  }
  const double date = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  OrderedJson json = {{"results", scores},
                      {"group_subtasks", subtasks},
                      {"configs", configs},
                      {"versions", versions},
                      {"n-shot", shots},
                      {"higher_is_better", higher},
                      {"n-samples", samples},
                      {"config",
                       {{"model", "moesaic"},
                        {"model_args", OrderedJson::parse(info.model_args.dump())},
                        {"batch_size", info.batch_size},
                        {"device", info.device},
                        {"limit", info.limit > 0 ? OrderedJson(info.limit) : OrderedJson(nullptr)},
                        {"bootstrap_iters", options.bootstrap_iters},
                        {"gen_kwargs", nullptr},
                        {"asked", info.asked},
                        {"random_seed", info.seed},
                        {"numpy_seed", info.seed},
                        {"torch_seed", info.seed},
                        {"fewshot_seed", info.seed}}},
                      {"git_hash", nullptr},
                      {"date", date},
                      {"moesaic_version", info.version},
                      {"task_hashes", hashes},
                      {"model_source", "moesaic"},
                      {"model_name", info.model},
                      {"model_name_sanitized", sanitized(info.model)},
                      {"system_instruction", nullptr},
                      {"chat_template", null_if_empty(info.chat_template)},
                      {"chat_template_sha",
                       info.chat_template.empty() ? OrderedJson(nullptr) : OrderedJson(sha256_hex(info.chat_template))},
                      {"total_evaluation_time_seconds", fmt::format("{:.3f}", info.seconds)}};
  if (!variants.empty()) json["variants"] = variants;
  if (!ties.empty()) json["ties"] = ties;
  if (!routing.empty()) json["routing"] = routing;
  return json;
}

fs::path write_results(const fs::path& dir, OrderedJson results, const std::vector<TaskResult>& tasks,
                       const RunInfo& info, bool samples) {
  const fs::path folder = dir / sanitized(info.model);
  std::error_code error;
  fs::create_directories(folder, error);
  MOESAIC_CHECK(!error, DataError, "--output_path {}: can't make the folder {}: {}", dir.string(), folder.string(),
                refusal(error.value()));
  const std::string time = file_time();
  const fs::path path = folder / fmt::format("results_{}.json", time);
  auto write = [](const fs::path& file, const OrderedJson& json) {
    write_file_atomically(file, json.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  };
  if (results.contains("routing")) {
    write(folder / fmt::format("routing_{}.json", time), results["routing"]);
    results.erase("routing");
  }
  if (results.contains("suite")) {
    write_file_atomically(folder / fmt::format("suite_{}.html", time), suite_html(results["suite"]));
  }
  write(path, results);
  if (samples) {
    for (const TaskResult& task : tasks) {
      std::string lines;
      for (const OrderedJson& row : task.samples) {
        lines += row.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
      }
      write_file_atomically(folder / fmt::format("samples_{}_{}.jsonl", sanitized(task.name), time), lines);
    }
  }
  return path;
}

std::string results_table(const std::vector<TaskResult>& results) {
  size_t width = 5;
  for (const TaskResult& result : results) width = std::max(width, result.name.size());
  const std::string rule = fmt::format("|{:-<{}}|{:->8}|{:-<22}|{:->8}|{:->9}|\n", "", width + 2, "", "", "", "");
  std::string table =
      fmt::format("| {:<{}} | {:>6} | {:<20} | {:>6} | {:>7} |\n", "task", width, "n", "metric", "value", "stderr");
  table += rule;
  for (const TaskResult& result : results) {
    std::string name = result.name, count = std::to_string(result.questions);
    auto line = [&](const std::string& metric, double value, const std::string& error) {
      table +=
          fmt::format("| {:<{}} | {:>6} | {:<20} | {:>6.4f} | {:>7} |\n", name, width, count, metric, value, error);
      name = count = "";
    };
    for (const auto* metrics : {&result.metrics, &result.corpus_metrics}) {
      for (const auto& [metric, mean] : *metrics) {
        line(metric, mean.value, std::isnan(mean.standard_error) ? "N/A" : fmt::format("{:.4f}", mean.standard_error));
      }
    }
    for (const auto& [metric, value] : result.variant_median) line(metric + " (median)", value, "");
    if (result.ties > 0)
      table += fmt::format("| {:<{}} | {:>6} | {:<20} | {:>6} | {:>7} |\n", "", width, "", "ties", result.ties, "");
  }
  return table;
}

}  // namespace moesaic::eval
