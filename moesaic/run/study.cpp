#include "moesaic/run/study.h"

#include "moesaic/base/check.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/text.h"
#include "moesaic/base/yaml.h"
#include "moesaic/run/compare.h"
#include "moesaic/run/config.h"
#include "moesaic/run/report.h"

namespace moesaic::run {

namespace fs = std::filesystem;

namespace {

/// One value of every key: "key=value, key=value" and what it sets.
struct Combination {
  std::string label;
  bool at_edge = false;
  std::vector<std::string> overrides;
};

/// Every combination of {key: [values]}; one that sets nothing where there is no key.
std::vector<Combination> combinations(const OrderedJson& lists, const std::string& where) {
  MOESAIC_CHECK(lists.is_null() || lists.is_object(), UsageError, "{}: got {}, expected keys with lists of values",
                where, lists.dump().substr(0, 60));
  std::vector<Combination> all(1);
  for (const auto& [key, values] : lists.items()) {
    MOESAIC_CHECK(values.is_array() && !values.empty(), UsageError, "{}.{}: got {}, expected a list of values", where,
                  key, values.dump().substr(0, 60));
    std::vector<Combination> longer;
    const bool numbers =
        values.size() > 2 && std::all_of(values.begin(), values.end(), [](const auto& v) { return v.is_number(); });
    for (const Combination& before : all) {
      for (const OrderedJson& value : values) {
        Combination next = before;
        const std::string text = fmt::format("{}={}", key, value.is_string() ? value.get<std::string>() : value.dump());
        next.label += (next.label.empty() ? "" : ", ") + text;
        next.at_edge |= numbers && (value == *std::min_element(values.begin(), values.end()) ||
                                    value == *std::max_element(values.begin(), values.end()));
        next.overrides.push_back(fmt::format("{}={}", key, value.dump()));
        longer.push_back(std::move(next));
      }
    }
    all = std::move(longer);
  }
  return all;
}

bool rises(const Study& study) { return study.metric.starts_with("eval/") || study.means.contains(study.metric); }

StudyRun make_run(const OrderedJson& config, const std::string& name, const fs::path& dir, uint64_t seed,
                  const std::string& where) {
  StudyRun run{fmt::format("{}, seed={}", name, seed), dir / fmt::format("seed={}", seed), config};
  for (const char* own : {"output_dir", "seed"}) {
    MOESAIC_CHECK(!config.contains(own), UsageError, "{}: {}: {}: got {}, expected none: every run has its own", where,
                  name, own, config[own].dump());
  }
  run.config["seed"] = seed;
  run.config["output_dir"] = run.dir.string();
  try {
    parse_run_config(run.config, run.name);
  } catch (const UsageError& error) {
    throw UsageError(fmt::format("{}: {}", where, error.what()));
  }
  return run;
}

bool is_done(const StudyRun& run) {
  if (!fs::exists(run.dir / kReportFile)) return false;
  const auto status = read_report(run.dir).value("status", "");
  return status == "finished" || status == "stopped early";
}

}  // namespace

std::string folder_name(const std::string& name) {
  std::string folder;
  for (const char c : name) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_-+=.,", c) != nullptr || c < 0;
    if (plain) folder += c;
    if (c == '/') folder += '_';
  }
  return folder;
}

Study read_study(const fs::path& file, const std::vector<std::string>& overrides) {
  OrderedJson json = read_yaml(file);
  apply_overrides(json, overrides);
  const std::string where = file.string();
  MOESAIC_CHECK(json.is_object(), UsageError, "{}: expected keys with values", where);
  check_known_keys(json, {"output_dir", "run.*", "methods.*", "settings.*", "sweep.*", "metric", "means.*", "seeds"},
                   where);
  Study study;
  study.output_dir = get<std::string>(json, "output_dir", where);
  study.metric = get_or<std::string>(json, "metric", "eval_loss", where);
  study.means = get_or<decltype(study.means)>(json, "means", {}, where);
  const auto seeds = get_or<std::vector<uint64_t>>(json, "seeds", {42}, where);
  MOESAIC_CHECK(!seeds.empty() && std::set<uint64_t>(seeds.begin(), seeds.end()).size() == seeds.size(), UsageError,
                "{}: seeds: got {}, expected different numbers, at least one", where, json["seeds"].dump());
  const OrderedJson methods = json.value("methods", OrderedJson()), shared = json.value("run", OrderedJson());
  MOESAIC_CHECK(methods.is_object() && !methods.empty(), UsageError,
                "{}: methods: got {}, expected names with the keys of each", where, methods.dump().substr(0, 60));
  MOESAIC_CHECK(shared.is_object(), UsageError, "{}: run: got {}, expected the keys that all runs have", where,
                shared.dump().substr(0, 60));
  std::set<std::string> folders;
  for (const auto& [method, given] : methods.items()) {
    OrderedJson keys = given;
    OrderedJson sweep = json.value("sweep", OrderedJson());
    std::string sweep_where = where + ": sweep";
    if (keys.is_object() && keys.contains("sweep")) {
      sweep = keys["sweep"];
      sweep_where = fmt::format("{}: methods.{}.sweep", where, method);
      keys.erase("sweep");
    }
    for (const Combination& setting : combinations(json.value("settings", OrderedJson()), where + ": settings")) {
      StudyRow row{method + (setting.label.empty() ? "" : ", " + setting.label), {}};
      const std::string folder = folder_name(row.name);
      MOESAIC_CHECK(folders.insert(folder).second, UsageError, "{}: methods: two rows have the folder {}", where,
                    folder);
      for (const Combination& swept : combinations(sweep, sweep_where)) {
        OrderedJson config = shared;
        config.merge_patch(keys);
        apply_overrides(config, setting.overrides);
        apply_overrides(config, swept.overrides);
        StudyRow::Choice& choice = row.choices.emplace_back(StudyRow::Choice{swept.label, swept.at_edge, {}});
        const std::string name = row.name + (swept.label.empty() ? "" : ", " + swept.label);
        const fs::path dir = study.output_dir / folder / folder_name(swept.label);
        for (const uint64_t seed : seeds) choice.runs.push_back(make_run(config, name, dir, seed, where));
      }
      study.rows.push_back(std::move(row));
    }
  }
  return study;
}

StudyOutcome run_study(const Study& study, const std::function<RunEnd(const StudyRun& run)>& train) {
  StudyOutcome outcome{{{"rows", OrderedJson::array()}, {"failed", OrderedJson::array()}}, {}, {}, false};
  // True when the run is done; what is in the way of the study is thrown.
  auto done = [&](const StudyRun& run) {
    fs::create_directories(run.dir.parent_path());
    write_new_file(run.file(), to_yaml(run.config));
    if (is_done(run)) return true;
    const RunEnd end = train(run);
    outcome.interrupted = end == RunEnd::kInterrupted;
    if (end == RunEnd::kFailed) outcome.summary["failed"].push_back(run.name);
    return end == RunEnd::kFinished;
  };
  for (const StudyRow& row : study.rows) {
    const bool sweeps = row.choices.size() > 1;
    const StudyRow::Choice* kept = sweeps ? nullptr : &row.choices[0];
    double best = 0;
    OrderedJson swept = OrderedJson::object();
    for (const StudyRow::Choice& choice : row.choices) {
      if (!sweeps) break;
      const bool finished = done(choice.runs[0]);
      if (outcome.interrupted) return outcome;
      if (!finished) continue;
      const Json value = reported_figure(read_report(choice.runs[0].dir), study.metric, study.means);
      MOESAIC_CHECK(value.is_number(), DataError, "metric: {} was not measured by {}\nhint: {}", study.metric,
                    choice.runs[0].name,
                    study.metric.starts_with("eval_") ? "val_size or eval_dataset, and eval_steps" : "eval.tasks");
      swept[choice.label] = value;
      const auto figure = value.get<double>();
      if (kept == nullptr || (rises(study) ? figure > best : figure < best)) {
        kept = &choice;
        best = figure;
      }
    }
    OrderedJson summary{
        {"name", row.name}, {"choice", nullptr}, {"at_edge", false}, {"sweep", swept}, {"runs", OrderedJson::array()}};
    if (kept != nullptr) {
      summary["choice"] = kept->label;
      summary["at_edge"] = kept->at_edge;
      for (const StudyRun& run : kept->runs) {
        const bool finished = done(run);
        if (outcome.interrupted) return outcome;
        if (!finished) continue;
        summary["runs"].push_back(run.name);
        outcome.runs.push_back(run.dir);
        outcome.rows.push_back(row.name);
      }
    }
    outcome.summary["rows"].push_back(summary);
  }
  return outcome;
}

OrderedJson peft_result(const fs::path& dir, const std::string& name) {
  const Json report = read_report(dir);
  const fs::path adapter = dir / "adapter_config.json";
  OrderedJson settings = report.at("settings");
  settings["model_id"] = report.at("model");
  std::map<std::string, double> accuracies;  // by task
  for (const Json& row : report.at("log")) {
    for (const auto& [key, value] : row.items()) {
      const std::string task = key.substr(0, key.rfind('/'));
      if (!key.starts_with("eval/") || key.ends_with(kTaskInformation) || accuracies.contains(task)) continue;
      if (const Json accuracy = reported_figure(report, key); accuracy.is_number()) accuracies[task] = accuracy;
    }
  }
  OrderedJson last{{"step", report.at("steps")},
                   {"train loss", reported_figure(report, "loss")},
                   {"train total tokens", report.at("tokens")}};
  int64_t samples = 0;
  for (const Json& set : report.at("data")) samples += set.value("drawn", int64_t{0});
  last["train samples"] = samples;
  double sum = 0;
  for (const auto& [task, accuracy] : accuracies) sum += accuracy;
  last["test accuracy"] = accuracies.empty() ? Json() : Json(sum / static_cast<double>(accuracies.size()));
  constexpr const char* kForgetting = "eval_forgetting_loss";
  const Json before = reported_figure(report, kForgetting, {}, /*before=*/true);
  const Json after = reported_figure(report, kForgetting);
  last["forgetting"] =
      before.is_number() && after.is_number() ? Json(after.get<double>() - before.get<double>()) : Json();
  const Json peak = report.value("peak_memory_bytes", Json());
  return {{"run_info",
           {{"created_at", report.at("started")},
            {"total_time", report.at("seconds")},
            {"experiment_name", name},
            {"peft_branch", nullptr},
            {"train_config", settings},
            {"peft_config", fs::exists(adapter) ? OrderedJson(read_json(adapter)) : OrderedJson()},
            {"error_msg", ""}}},
          {"train_info",
           {{"accelerator_memory_reserved_avg", nullptr},
            {"accelerator_memory_max", peak},
            {"accelerator_memory_reserved_99th", nullptr},
            {"train_time", report.at("seconds")},
            {"file_size", report.value("result_bytes", Json())},
            {"num_trainable_params", report.at("trainable")},
            {"num_total_params", report.at("trainable").get<int64_t>() + report.at("base_parameters").get<int64_t>()},
            {"status", "success"},
            {"metrics", OrderedJson::array({last})}}},
          {"meta_info",
           {{"model_info", nullptr},
            {"dataset_info", nullptr},
            {"package_info", {{"moesaic", report.at("moesaic")}, {"torch-version", report.at("libtorch")}}},
            {"system_info", report.at("machine")},
            {"pytorch_info", nullptr}}}};
}

}  // namespace moesaic::run
