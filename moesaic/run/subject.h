// What a run can train: one row per finetuning_type.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/models/language_model.h"
#include "moesaic/nn/learner.h"
#include "moesaic/run/config.h"
#include "moesaic/run/plan.h"

namespace moesaic::run {

/// A model and what is learnt of it, ready for the trainer.
struct Prepared {
  std::shared_ptr<formats::Checkpoint> checkpoint;  // tokenizer and config; of a composition its anchor's
  std::shared_ptr<models::LanguageModel> model;
  std::shared_ptr<nn::Learner> learner;
  int64_t base_parameters = 0;  // of the model that is adapted
  bool keeps_tokenizer = true;  // the output folder holds the tokenizer
  Plan plan;                    // what it is: {"method", "molora, 8 experts, ..."}

  // What only some subjects do; empty otherwise.
  std::function<void(bool reads_again)> begin;  // before the first step: whether the run reads its data more than once
  std::function<void()> end;                    // behind the last
  std::function<std::vector<std::pair<std::string, int64_t>>(int64_t tokens)> more_memory;  // bytes by use
};

/// Where a run computes.
struct Place {
  torch::Device device = torch::kCPU;
  torch::ScalarType dtype = torch::kFloat32;
  bool dry = false;  // nothing is trained: what need not be loaded is not
  /// Called as soon as tokenizer and config are known; weights may be read behind it.
  std::function<void(const formats::Checkpoint&)> opened;
};

/// The adapter that a run of an adapter's finetuning_type begins with, trainable, at the sites of the model's first
/// part; to be attached.
std::shared_ptr<adapters::Adapter> begin_adapter(const RunConfig& run, const Place& place,
                                                 const formats::Checkpoint& checkpoint, models::LanguageModel& model);

/// A finetuning_type.
struct Subject {
  const char* name;
  const adapters::Method* method;  // nullptr: no adapter
  /// Throws UsageError for keys that it can't honour, and settles those that it decides; nullptr = nothing to check.
  void (*check)(RunConfig& run, const std::string& where);
  Prepared (*open)(const RunConfig& run, const Place& place);
};

/// The finetuning_type that trains the routers of a MoLoRA alone.
inline constexpr const char* kMix = "mix";

/// Throws UsageError with the known names.
const Subject& subject_of(const std::string& finetuning_type);

}  // namespace moesaic::run
