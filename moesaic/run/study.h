// A study: methods x settings x seeds, each a run of `moesaic train`; what is swept is chosen for every row first.
#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/run/report.h"

namespace moesaic::run {

/// `name` as part of a path: letters, digits and a few signs of it.
std::string folder_name(const std::string& name);

/// A run of a study.
struct StudyRun {
  std::string name;           // "molora, router.top_k=2, seed=1"
  std::filesystem::path dir;  // output folder
  std::filesystem::path file() const { return dir.string() + ".yaml"; }
  OrderedJson config;  // what that file holds
};

/// A line of the table: a method with one value of every setting.
struct StudyRow {
  /// The runs with one combination of the swept keys, one per seed.
  struct Choice {
    std::string label;  // "learning_rate=0.001"; "" where nothing is swept
    bool at_edge;       // a swept value is the least or the greatest of at least three
    std::vector<StudyRun> runs;
  };
  std::string name;  // "molora, router.top_k=2"
  std::vector<Choice> choices;
};

/// A study file:
///
///   output_dir: FOLDER
///   run: {keys of a run file that all runs have}
///   methods: {name: {keys that the method adds or replaces}}
///   settings: {key: [values]}       every combination with every method
///   sweep: {key: [values]}          every row keeps the combination that serves it best with the first seed; one
///                                   among a method's keys is that method's, in place of this
///   metric: eval_loss               judged by this: a loss falls; a score, eval/<task>/<metric>, or one of means rises
///   means: {name: [scores]}         their mean, a figure of its own; * stands for any characters
///   seeds: [1, 2, 3]
struct Study {
  std::filesystem::path output_dir;
  std::string metric;
  Means means;
  std::vector<StudyRow> rows;
};

/// Reads a study file. Throws UsageError for what is wrong in it or in one of its runs, which it names.
Study read_study(const std::filesystem::path& file, const std::vector<std::string>& overrides = {});

enum class RunEnd { kFinished, kFailed, kInterrupted };

/// What became of a study, as study.json holds it:
///
///   {"rows": [{"name", "choice", "at_edge", "sweep": {choice: metric}, "runs": [names]}], "failed": [names]}
///
/// and of each of these runs results/<name>.json: see peft_result.
struct StudyOutcome {
  OrderedJson summary;
  std::vector<std::filesystem::path> runs;  // finished ones of the choices that were kept, row by row
  std::vector<std::string> rows;            // the row of each
  bool interrupted = false;
};

/// Runs what has not been run yet: `train` trains the run file that stands at run.file(). A failed run is noted and the
/// study goes on. Throws UsageError where a folder holds a run of other keys, DataError where no report has the metric.
StudyOutcome run_study(const Study& study, const std::function<RunEnd(const StudyRun& run)>& train);

/// A run's report in the form of the results of PEFT's method_comparison: run_info, train_info, meta_info. The last of
/// its metrics has "test accuracy", the mean of every task's first score, and "forgetting": the rise of the loss on the
/// evaluation data named `forgetting`, where there is one that was evaluated before the first step (eval_on_start).
OrderedJson peft_result(const std::filesystem::path& dir, const std::string& name);

}  // namespace moesaic::run
