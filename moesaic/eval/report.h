// Evaluation results for programs (lm-evaluation-harness's JSON) and for people (a table).
#pragma once
#include "moesaic/eval/evaluate.h"

namespace moesaic::eval {

/// What stands beside the scores.
struct RunInfo {
  std::string version{};  // of this program
  std::string model{};    // what was evaluated: the adapters, or the model; results are named after it
  Json model_args = Json::object();
  std::string batch_size = "auto";
  std::string device{};
  int64_t limit = 0;
  uint64_t seed = 0;
  std::string asked{};          // how questions were put, and why so
  std::string chat_template{};  // its source, when it was applied
  double seconds = 0;
};

/// results.<task>: "alias", "acc,none", "acc_stderr,none", "acc_norm,none", ... and the blocks beside it that the
/// harness writes (configs, versions, n-shot, higher_is_better, n-samples, config, ...). Ours beside them: `variants`
/// (scores per prompt template; their median is "<metric>_template_median,none"), `ties` and `routing`.
OrderedJson results_json(const std::vector<TaskResult>& results, const std::vector<Task>& tasks,
                         const EvalOptions& options, const RunInfo& info);

/// Writes <dir>/<model with / as __>/results_<time>.json, `routing` apart as routing_<time>.json, and, with `samples`,
/// samples_<task>_<time>.jsonl beside it; of a suite its page, suite_<time>.html. Returns the results file.
std::filesystem::path write_results(const std::filesystem::path& dir, OrderedJson results,
                                    const std::vector<TaskResult>& tasks, const RunInfo& info, bool samples);

/// One line per task and metric.
std::string results_table(const std::vector<TaskResult>& results);

}  // namespace moesaic::eval
