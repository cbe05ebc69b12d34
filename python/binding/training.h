// A run of `moesaic train` as Python holds it.
#pragma once
#include <torch/custom_class.h>

#include <memory>
#include <string>
#include <vector>

#include "moesaic/run/run.h"
#include "python/binding/job.h"

namespace moesaic::python {

class Training : public torch::CustomClassHolder {
 public:
  /// keys: a run's, JSON, or the path of a run file with `overrides` (key=value). Opens model, data and tasks.
  Training(const std::string& keys, const std::string& file, const std::vector<std::string>& overrides, bool dry);
  /// What will be trained; of a dry run with the memory it needs.
  std::string plan() { return plan_; }
  std::string output_dir() { return output_dir_; }
  /// Tells rows {"step", "max_steps", "loss", "learning_rate", "grad_norm", "tokens_per_second", "aux_loss", "tokens",
  /// "seconds"}, and those of train_log.jsonl as {"row": ...}. Stopped, it saves its step and ends `interrupted`.
  /// Result: {"steps", "train_loss", "best", "interrupted", "stopped_early", "seconds", "tokens"}.
  c10::intrusive_ptr<Job> start();

 private:
  std::unique_ptr<run::Run> run_;  // nullptr: begun, or only planned
  std::string plan_, output_dir_;
};

}  // namespace moesaic::python
