// `moesaic demo calm`: two models made from nothing, one that knows keys and one that can calculate, and a composition
// that does what neither can.
#include <fmt/format.h>

#include "cli/command.h"
#include "demos/key_experiment.h"
#include "moesaic/base/device.h"
#include "moesaic/base/progress.h"

namespace moesaic::cli {
namespace {

using demos::KeyText;

struct CalmDemoOptions {
  std::string output_dir = "runs/calm";
  int64_t test_rows = 400;
  double fraction = 1.0;
  bool ablations = false;
  bool json = false;
};

/// The two models and their composition; with `ablations` also what lacks or replaces a part of it.
std::vector<demos::KeyRow> run_experiment(demos::KeyExperiment& experiment, bool ablations) {
  std::vector<demos::KeyRow> rows;
  rows.push_back(experiment.make_model("augmenting", demos::KeyText::kSubstitution, 400));
  rows.push_back(experiment.make_model("anchor", demos::KeyText::kArithmetic, 1600));
  compose::CompositionConfig config;
  config.connection.num_heads = 4;
  config.connection.norm = "none";  // the paper's form: models this small have no large states
  config.augmenting = {{compose::evenly_spaced(2, 4, 4)}};
  rows.push_back(experiment.compose("composition", "anchor", "augmenting", config));
  if (!ablations) return rows;
  const int64_t parameters = rows.back().trained;

  experiment.make_random_model("random");
  rows.push_back(experiment.compose("random augmenting model", "anchor", "random", config));
  experiment.make_model("other values", demos::KeyText::kOtherwise, 400);
  rows.push_back(experiment.compose("vanilla augmenting model", "anchor", "other values", config));
  compose::CompositionConfig prefix = config, unplaced = config, last = config, all = config;
  prefix.augmenting[0].mask = "prefix";
  rows.push_back(experiment.compose("prompt read once", "anchor", "augmenting", prefix));
  unplaced.connection.cross_position = "none";
  rows.push_back(experiment.compose("without positions", "anchor", "augmenting", unplaced));
  last.augmenting[0].connections = compose::evenly_spaced(1, 4, 4);
  rows.push_back(experiment.compose("last blocks only", "anchor", "augmenting", last));
  all.augmenting[0].connections = compose::evenly_spaced(4, 4, 4);
  rows.push_back(experiment.compose("all four blocks", "anchor", "augmenting", all));
  rows.push_back(experiment.adapt("LoRA on the anchor", "anchor", parameters));
  rows.push_back(experiment.tune("anchor tuned on KV-SUB", "anchor", demos::KeyText::kSubstitution));
  return rows;
}

/// Of a share `right` of `questions`: sample deviation / sqrt(questions).
double standard_error(double right, int64_t questions) {
  return questions > 1 ? std::sqrt(right * (1 - right) / static_cast<double>(questions - 1)) : 0;
}

Json results_json(const std::vector<demos::KeyRow>& rows, const CalmDemoOptions& options, uint64_t seed) {
  Json json{{"seed", seed}, {"test_rows", options.test_rows}, {"fraction", options.fraction}};
  for (const demos::KeyRow& row : rows) {
    for (size_t i = 0; i < std::size(demos::kKeyTasks); ++i) {
      json["table"][row.name][demos::kKeyTasks[i].first] = row.scores[i];
      json["standard_error"][row.name][demos::kKeyTasks[i].first] = standard_error(row.scores[i], options.test_rows);
    }
    json["trained_parameters"][row.name] = row.trained;
    json["train_seconds"][row.name] = row.seconds;
  }
  return json;
}

void print_table(const std::vector<demos::KeyRow>& rows, int64_t questions) {
  say("\nRight answers to {} questions each, ± one standard error, on keys the connections were never trained with:\n\n"
      "  {:<26}",
      questions, "");
  for (const auto& [name, task] : demos::kKeyTasks) say("{:>15}", name);
  say("{:>12}{:>10}\n", "trained", "time");
  for (const demos::KeyRow& row : rows) {
    say("  {:<26}", row.name);
    for (const double score : row.scores) {
      say("{:>15}", fmt::format("{:.1f} ± {:.1f} %", 100 * score, 100 * standard_error(score, questions)));
    }
    say("{:>12}{:>10}\n", row.trained, format_duration(row.seconds));
  }
}

int run_calm_demo(const CalmDemoOptions& options, const CommonOptions& common) {
  if (!options.json) {
    say("The augmenting model learns what 500 keys are worth, the anchor learns to add and subtract. Both are then\n"
        "frozen and joined by two cross-attentions, trained on 100 of the keys. All questions use the other 400.\n\n");
  }
  const FolderLock lock = take_demo_folder(options.output_dir, "");
  demos::KeyExperiment experiment(options.output_dir, common.seed, options.fraction, options.test_rows,
                                  parse_device(common.device));
  const std::vector<demos::KeyRow> rows = run_experiment(experiment, options.ablations);
  const Json results = results_json(rows, options, common.seed);
  const std::filesystem::path folder = options.output_dir;
  write_file_atomically(folder / "results.json", results.dump(2) + "\n");
  if (options.json) {
    say("{}\n", results.dump(2));
    return 0;
  }
  print_table(rows, options.test_rows);
  say("\nWritten: {0}/results.json, the models {0}/augmenting and {0}/anchor, the connections {0}/composition\n",
      options.output_dir);
  return 0;
}

}  // namespace

Runner add_calm_demo(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<CalmDemoOptions>();
  app.add_option("--output_dir", options->output_dir, "Where models and results go")->capture_default_str();
  app.add_option("--test_rows", options->test_rows, "Questions per task")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--fraction", options->fraction, "Share of the training steps, for a quick look")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  app.add_flag("--ablations", options->ablations,
               "Also train compositions that lack something, a LoRA of the same size, and the anchor on the keys");
  app.add_flag("--json", options->json, "Print the results as JSON, and nothing else on standard output");
  return [options, &common] { return run_calm_demo(*options, common); };
}

}  // namespace moesaic::cli
