// One training run, from its parsed keys to the files it leaves.
#pragma once
#include <atomic>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/data/dataset.h"
#include "moesaic/data/validate.h"
#include "moesaic/eval/task.h"
#include "moesaic/run/plan.h"
#include "moesaic/run/report.h"
#include "moesaic/run/subject.h"
#include "moesaic/train/cost.h"
#include "moesaic/train/memory.h"
#include "moesaic/train/trainer.h"

namespace moesaic::run {

/// Opens everything the config names: model, learner, data, tasks. Throws what these throw.
class Run {
 public:
  /// Holds the output folder, where it must find nothing that this run would overwrite, unless the run is `dry`: then
  /// nothing is trained, and what need not be loaded for a plan is not.
  /// group: the ranks that open and train it together, each with the same config.
  explicit Run(RunConfig config, bool dry = false,
               std::shared_ptr<ranks::Group> group = std::make_shared<ranks::Group>());

  const RunConfig& config() const { return config_; }
  models::LanguageModel& model() { return *prepared_.model; }
  nn::Learner& learner() { return *prepared_.learner; }
  const data::Renderer& renderer() const { return *renderer_; }
  /// Data sets with what was drawn of them so far.
  std::vector<data::MixtureCount> counts() const { return mixture_->counts(); }

  /// Reads and renders every row of the training data; a result per data set, naming at most `max_problems` rows each.
  std::vector<data::Validation> judge_rows(size_t max_problems) const;
  /// Throws one DataError that names every bad row of the training data, or lists them where on_bad_row is skip. A run
  /// that is not dry judges them from its opening on.
  void check_rows();

  /// The next example of one of counts() that training would draw. Throws DataError when there is none.
  data::Example next_example(size_t dataset) { return mixture_->next_of(dataset); }

  /// For a dry run: throws what training would before its first step, where a run that is not dry throws it when it is
  /// opened (the output folder) or when it begins (the checkpoint it goes on with).
  void check_start();

  /// Numbers that the run trains.
  int64_t trainable() const;
  /// What the run will do.
  Plan plan();
  /// What the run will hold at its peak; with `on`, what it holds and how long it takes there. Draws from the data, so
  /// nothing can be trained afterwards.
  Plan needs_plan(const train::Accelerator* on = nullptr);
  /// Writes run.yaml and the tokenizer, trains, and writes the model card when the run was not interrupted; beside it
  /// all the run's report. command: what the user typed, for the report. Of several ranks the first one writes.
  train::TrainResult train(const train::TrainHooks& hooks = {}, const std::string& command = "");

 private:
  /// Rows are judged while weights are read; given up when the run ends before.
  struct Judgement {
    std::atomic<bool> given_up = false;
    std::future<std::vector<data::Validation>> verdict;
    ~Judgement() { given_up = true; }
  };

  void compare_ranks() const;
  void open_data(const formats::Checkpoint& checkpoint);
  std::vector<data::DatasetConfig> resolve(const Json& dataset) const;
  void warn_of_glued_text() const;
  void check_sentences() const;
  void settle_epochs();
  void write_inputs() const;
  void write_card(const train::TrainResult& result) const;
  train::Scores task_scores();
  OrderedJson report_facts(const std::string& command) const;
  OrderedJson report_counts() const;
  std::vector<int64_t> answer_ends() const;
  std::vector<std::string> sample_answers();
  void open_samples(Report& report);
  void close_report(const train::TrainResult& result, Report& report);

  RunConfig config_;
  bool dry_;
  std::shared_ptr<ranks::Group> group_;
  std::unique_ptr<FolderLock> lock_;
  torch::Device device_;
  NumberFormat format_;
  Prepared prepared_;
  std::shared_ptr<const data::Renderer> renderer_;
  std::vector<data::DatasetConfig> training_;
  std::unique_ptr<data::Mixture> mixture_;
  std::vector<train::EvalSet> eval_sets_;
  std::vector<eval::Task> tasks_;
  std::vector<data::Example> samples_;  // what the report shows the model's answers to
  Judgement judgement_;                 // the last: it reads the others
};

}  // namespace moesaic::run
