// `moesaic demo`: the main job on a real model, from the base's score to experts that do the skills, in one go, beside
// a LoRA of the same size. What is trained are runs as `moesaic train` makes them; what is done is noted in the
// folder's progress.json, so that the same command goes on where it was stopped.
#include <fmt/format.h>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "demos/greedy_match.h"
#include "demos/skills.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/base/device.h"
#include "moesaic/base/progress.h"
#include "moesaic/eval/metrics.h"
#include "moesaic/eval/routes.h"
#include "moesaic/run/open.h"
#include "moesaic/run/run.h"

namespace moesaic::cli {
namespace {

struct DemoOptions {
  std::string model = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  std::string output_dir = "runs/demo";
  int64_t steps = 140;
  int64_t batch_size = 8;
  int64_t test_rows = demos::kTestRows;
  bool compare = false;
  bool json = false;
};

constexpr int64_t kRoutedRows = 10;  // test instances per skill behind the routing page
constexpr int64_t kExperts = 8;
constexpr int64_t kRank = 4;  // of an expert
constexpr const char* kBase = "base";

/// "0110" -> {0, 1, 1, 0}.
std::vector<double> numbers_of(const std::string& answers) {
  std::vector<double> numbers;
  for (const char c : answers) numbers.push_back(c == '1');
  return numbers;
}

/// Which questions of all skills of one kind are answered, in the order of the skills.
std::vector<double> answers_of(const OrderedJson& column, bool held_out) {
  std::string answers;
  for (const demos::Skill& skill : demos::skills()) {
    if (skill.held_out == held_out) answers += column["answers"][skill.name].get<std::string>();
  }
  return numbers_of(answers);
}

OrderedJson figure(const std::vector<double>& values) {
  const eval::Mean mean = eval::mean_of(values);
  return {{"value", mean.value}, {"standard_error", mean.standard_error}, {"questions", values.size()}};
}

class Demo {
 public:
  Demo(const DemoOptions& options, const CommonOptions& common)
      : options_(options), common_(common), folder_(options.output_dir), device_(parse_device(common.device)) {
    MOESAIC_CHECK(std::filesystem::exists(options.model), UsageError,
                  "--model {}: no such file. `make demo` fetches it; any folder with config.json or GGUF file will do.",
                  options.model);
    const NumberFormat format = number_format(common.dtype, device_);
    dtype_ = format.dtype;
    say("Computing in {} on {}: {}.\n\n", dtype_name(dtype_), device_.str(), format.reason);
    begin_or_go_on();
    demos::write_skills(folder_ / "data", demos::kTrainRows, options.test_rows, common.seed);
    for (const demos::Skill& skill : demos::skills()) {
      if (!skill.held_out) trained_.push_back(skill.name);
    }
  }

  /// Trains a column of the table. False when a signal stopped it: a checkpoint is left then.
  bool train(const std::string& method, int64_t rank) {
    OrderedJson& column = done_["columns"][method];
    if (column.contains("steps") && column["steps"] == options_.steps) return true;
    run::Run run(run_file(method, rank, "auto"));
    std::unique_ptr<Progress> progress;
    const CatchSignals signals({SIGINT, SIGTERM, SIGHUP, SIGUSR1}, /*once=*/true);
    train::TrainHooks hooks;
    hooks.stop = [&] { return signals.caught(); };
    hooks.on_log = [&](const train::StepLog& log) {
      if (!progress) progress = std::make_unique<Progress>("Training " + method, log.max_steps, log.step - 1);
      progress->update(log.step, fmt::format("loss {:.3f}, {:.0f} tokens/s", log.loss, log.tokens_per_second));
    };
    column["trainable_parameters"] = run.trainable();
    const train::TrainResult result = run.train(hooks);
    progress.reset();
    column["steps"] = result.steps;
    column["train_seconds"] = column.value("train_seconds", 0.0) + result.seconds;
    note();
    if (result.interrupted) say_error("stopped after step {} of {}; the same command goes on\n", result.steps, method);
    return !result.interrupted;
  }

  /// Asks the base, or what a method made of it.
  void test(const std::string& name) {
    OrderedJson& column = done_["columns"][name];
    if (column.contains("answers")) return;
    std::vector<run::AdapterReference> adapters;
    if (name != kBase) adapters.push_back({name, folder_ / name});
    const run::Opened opened = run::open(options_.model, adapters, {.device = device_, .dtype = dtype_});
    const auto renderer = data::Renderer::open(*opened.checkpoint, {});
    column["answers"] = answers("Testing " + name, *opened.model, *renderer);
    if (name == "molora") write_routes(opened, *renderer);
    note();
  }

  /// The rank at which LoRA trains about as many numbers as the MoLoRA that was trained.
  int64_t lora_rank() const {
    const run::Run one(run_file("lora", 1, "none"), /*dry=*/true);
    const int64_t per_rank = one.trainable(), wanted = done_["columns"]["molora"]["trainable_parameters"];
    return std::max<int64_t>(1, (wanted + per_rank / 2) / per_rank);
  }

  /// What results.json holds: every column's figures with their errors, and what MoLoRA is ahead of LoRA.
  OrderedJson results() const {
    OrderedJson results = done_;
    for (auto& [name, column] : results["columns"].items()) {
      for (const bool held_out : {false, true}) {
        column[held_out ? "never_trained" : "trained"] = figure(answers_of(column, held_out));
      }
      OrderedJson skills;
      for (const auto& [skill, answers] : column["answers"].items())
        skills[skill] = figure(numbers_of(answers.get<std::string>()));
      column["skills"] = skills;
    }
    for (const bool held_out : {false, true}) {
      std::vector<double> ahead = answers_of(done_["columns"]["molora"], held_out);
      const std::vector<double> other = answers_of(done_["columns"]["lora"], held_out);
      for (size_t i = 0; i < ahead.size(); ++i) ahead[i] -= other[i];
      results["molora_minus_lora"][held_out ? "never_trained" : "trained"] = figure(ahead);
    }
    return results;
  }

  void finish(const OrderedJson& results, const std::string& table) const {
    write_file_atomically(folder_ / "README.md",
                          fmt::format("# A demo of moesaic on {}\n\n```\n{}```\n\n`results.json` has every answer. "
                                      "`molora` and `lora` are runs as `moesaic train` leaves them, each with its "
                                      "`run.yaml`; `routes.html` shows which expert does what.\n",
                                      options_.model, table));
    write_file_atomically(folder_ / "results.json", results.dump(1) + "\n");
    std::filesystem::remove(folder_ / "progress.json");
  }

 private:
  /// Reads what an earlier call of the same demo has done.
  void begin_or_go_on() {
    OrderedJson settings{
        {"model", options_.model},         {"steps", options_.steps}, {"batch_size", options_.batch_size},
        {"test_rows", options_.test_rows}, {"seed", common_.seed},    {"dtype", dtype_name(dtype_)}};
    const std::filesystem::path file = folder_ / "progress.json";
    done_ = {{"settings", settings}, {"columns", OrderedJson::object()}};
    if (!std::filesystem::exists(file)) return note();
    const OrderedJson found = parse_ordered_json(read_file(file), file.string());
    MOESAIC_CHECK(found.contains("settings") && found.contains("columns") && found["settings"] == settings, UsageError,
                  "--output_dir {}: got a folder with an unfinished demo of other settings ({}), expected the same ({})"
                  "\nhint: repeat its command, or make demo ARGS=\"--output_dir runs/another\"",
                  folder_.string(), found.value("settings", OrderedJson()).dump(), settings.dump());
    done_ = found;
    say("Going on with the demo that was stopped in {}.\n", folder_.string());
  }

  void note() const { write_file_atomically(folder_ / "progress.json", done_.dump(1) + "\n"); }

  run::RunConfig run_file(const std::string& method, int64_t rank, const std::string& resume) const {
    const adapters::Method& kind = adapters::method_of(method);
    OrderedJson file{{"model_name_or_path", options_.model},
                     {"dataset_dir", (folder_ / "data").string()},
                     {"dataset", trained_},
                     {"finetuning_type", method},
                     {"lora_target", "all-linear"},
                     {"per_device_train_batch_size", options_.batch_size},
                     {"max_steps", options_.steps},
                     // Vectors start at one and move less per step than matrices that start at zero.
                     {"learning_rate", kind.low_rank ? 1e-3 : 1e-2},
                     {"save_steps", 20},
                     {"save_total_limit", 1},
                     {"resume_from_checkpoint", resume},
                     {"output_dir", (folder_ / method).string()},
                     {"device", common_.device},
                     {"bf16", dtype_ == torch::kBFloat16},
                     {"seed", common_.seed}};
    if (kind.mixes) file["num_experts"] = kExperts;
    if (kind.low_rank) {
      file["lora_rank"] = rank;
      file["lora_alpha"] = 4 * rank;  // the same scale for every rank
    } else {
      file.erase("lora_target");
    }
    return run::parse_run_config(file, "the demo's " + method);
  }

  /// Per skill a character for each test question: '1' where greedy decoding answers it exactly.
  OrderedJson answers(const std::string& title, models::LanguageModel& model, const data::Renderer& renderer) const {
    std::vector<data::Example> all;
    for (const demos::Skill& skill : demos::skills()) {
      for (data::Example& example :
           data::load_examples(data::resolve_datasets(skill.name + "_test", folder_ / "data"), renderer)) {
        all.push_back(std::move(example));
      }
    }
    Progress progress(title, static_cast<int64_t>(all.size()));
    const std::vector<uint8_t> matches =
        demos::greedy_matches(model, all, 2048, [&](int64_t done) { progress.update(done); });
    progress.finish();
    OrderedJson right;
    auto it = matches.begin();
    for (const demos::Skill& skill : demos::skills()) {
      std::string text;
      for (int64_t row = 0; row < options_.test_rows; ++row) text += *it++ ? '1' : '0';
      right[skill.name] = text;
    }
    return right;
  }

  /// routes.json and routes.html: what the trained adapter's routers do on test instances, as `moesaic routes`.
  void write_routes(const run::Opened& opened, const data::Renderer& renderer) const {
    const eval::EvalModel model{*opened.model, *opened.tokenizer, opened.chat_template.get()};
    eval::EvalOptions options;
    eval::ask_as_trained(model, options);
    std::vector<std::string> files;
    for (const demos::Skill& skill : demos::skills())
      files.push_back((folder_ / "data" / (skill.name + ".test.jsonl")).string());
    std::vector<eval::TaskRoutes> routings;
    Progress progress("Watching the routers", static_cast<int64_t>(files.size()));
    for (const eval::Task& task : eval::load_tasks(files, {.limit = kRoutedRows})) {
      routings.push_back(eval::route_task(model, task, options));
      progress.update(static_cast<int64_t>(routings.size()));
    }
    progress.finish();
    const auto first =
        data::load_examples(data::resolve_datasets(demos::skills().front().name + "_test", folder_ / "data"), renderer);
    const eval::TextRoutes text = eval::route_text(model, first.front().ids);
    const OrderedJson routes = eval::routes_json(options_.model, *opened.model, routings, &text);
    write_file_atomically(folder_ / "routes.json",
                          routes.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
    write_file_atomically(folder_ / "routes.html", eval::routes_html(routes));
  }

  DemoOptions options_;
  CommonOptions common_;
  std::filesystem::path folder_;
  c10::Device device_;
  torch::ScalarType dtype_;
  OrderedJson done_;  // {"settings", "columns": {"base" or method: {"answers", "train_seconds", ...}}}
  std::vector<std::string> trained_;
};

/// "67 ± 2.5 %".
std::string percent(const OrderedJson& figure) {
  return fmt::format("{:.0f} ± {:.1f} %", 100 * figure["value"].get<double>(),
                     100 * figure["standard_error"].get<double>());
}

std::string difference(const OrderedJson& results, const std::string& kind, const std::string& name) {
  const OrderedJson& found = results["molora_minus_lora"][kind];
  const double points = 100 * found["value"].get<double>(), error = 100 * found["standard_error"].get<double>();
  const bool clear = std::abs(points) > 1.96 * error;
  return fmt::format("MoLoRA - LoRA, {}: {:+.1f} points, 95 % interval {:+.1f} to {:+.1f}: {}.\n", name, points,
                     points - 1.96 * error, points + 1.96 * error,
                     !clear       ? "the difference lies within the error"
                     : points > 0 ? "MoLoRA is ahead"
                                  : "LoRA is ahead");
}

std::string table(const OrderedJson& results) {
  const OrderedJson& columns = results["columns"];
  const int64_t questions = results["settings"]["test_rows"];
  std::string text = fmt::format(
      "Answers that are exactly right, on instances never seen in training; {} questions per skill, ± one standard "
      "error:\n\n  {:<22}",
      questions, "skill");
  for (const auto& [name, column] : columns.items()) text += fmt::format("{:>15}", name);
  text += "\n";
  auto row = [&](const std::string& name, const std::function<std::string(const OrderedJson&)>& of) {
    text += fmt::format("  {:<22}", name);
    for (const auto& [_, column] : columns.items()) text += fmt::format("{:>15}", of(column));
    text += "\n";
  };
  for (const bool held_out : {false, true}) {
    if (held_out) text += "  never trained, of related kind:\n";
    for (const demos::Skill& skill : demos::skills()) {
      if (skill.held_out != held_out) continue;
      row((held_out ? "  " : "") + skill.name,
          [&](const OrderedJson& column) { return percent(column["skills"][skill.name]); });
    }
  }
  row("all trained skills", [](const OrderedJson& column) { return percent(column["trained"]); });
  row("all never trained", [](const OrderedJson& column) { return percent(column["never_trained"]); });
  row("trained numbers",
      [](const OrderedJson& column) { return std::to_string(column.value("trainable_parameters", int64_t{0})); });
  row("training time", [](const OrderedJson& column) {
    return column.contains("train_seconds") ? format_duration(column["train_seconds"].get<double>()) : "-";
  });
  text += "\n" + difference(results, "trained", "trained skills");
  text += difference(results, "never_trained", "never trained");
  return text;
}

int run_demo(const DemoOptions& options, const CommonOptions& common) {
  const FolderLock lock = take_demo_folder(options.output_dir, options.model);
  say("Growing a mixture of experts inside {}\n"
      "The model stays frozen; {} MoLoRA experts of rank {} sit beside each of its linears, with a router each.\n"
      "A LoRA of the same size is trained beside it, on the same data, {} steps each. With the defaults this takes\n"
      "about 10 minutes on two cores; Ctrl-C stops it, and the same command goes on.\n\n",
      std::filesystem::path(options.model).filename().string(), kExperts, kRank, options.steps);
  Demo demo(options, common);
  demo.test(kBase);
  std::vector<std::string> methods{"molora", "lora"};
  if (options.compare) methods.insert(methods.end(), {"ia3", "mov"});
  for (const std::string& method : methods) {
    if (!demo.train(method, method == "lora" ? demo.lora_rank() : kRank)) {
      return static_cast<int>(ExitCode::kInterrupted);
    }
    demo.test(method);
  }
  const OrderedJson results = demo.results();
  const std::string shown = table(results);
  demo.finish(results, shown);
  say("\n{}", shown);
  if (options.json) say("{}\n", results.dump(1));
  say("\nWritten: {0}/README.md (this table), {0}/results.json, the runs {0}/molora and {0}/lora,\n"
      "and which expert does what in {0}/routes.html\n\n"
      "Next:\n"
      "  build/moesaic chat {0}/molora\n"
      "  build/moesaic compare {0}/molora {0}/lora\n"
      "  build/moesaic train recipes/molora_smollm2.yaml dataset_dir={0}/data output_dir=runs/mine max_steps=20\n",
      options.output_dir);
  return 0;
}

}  // namespace

FolderLock take_demo_folder(const std::filesystem::path& dir, const std::filesystem::path& model) {
  check_new_folder(dir, {model});
  MOESAIC_CHECK(!std::filesystem::exists(dir / "results.json"), UsageError,
                "--output_dir {}: got a folder with the results of an earlier demo, expected another one: nothing is "
                "overwritten\nhint: make demo ARGS=\"--output_dir runs/another\"",
                dir.string());
  return FolderLock(dir);
}

Runner add_demo(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<DemoOptions>();
  app.add_option("--model", options->model, "Base model: GGUF file or Hugging Face folder")->capture_default_str();
  app.add_option("--output_dir", options->output_dir, "Where data, adapters and results go")->capture_default_str();
  app.add_option("--steps", options->steps, "Training steps of each")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--batch_size", options->batch_size, "Examples per step")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--test_rows", options->test_rows, "Test instances per skill")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{2}, int64_t{1'000'000}));
  app.add_flag("--compare", options->compare, "Also train (IA)^3 and MoV");
  app.add_flag("--json", options->json, "Also print the results as JSON");
  CLI::App* calm = app.add_subcommand("calm", "Compose two small models made from nothing, by cross-attention");
  calm->fallthrough();  // the common flags may follow
  const Runner run_calm = add_calm_demo(*calm, common);
  return [options, calm, run_calm, &common] { return calm->parsed() ? run_calm() : run_demo(*options, common); };
}

}  // namespace moesaic::cli
