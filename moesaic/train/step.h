// One optimiser step: forward and backward of its micro-batches, clipping, one update.
#pragma once
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "moesaic/moe/routing_stats.h"
#include "moesaic/ranks/tree_sum.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// The examples of one micro-batch.
struct MicroBatch {
  std::vector<data::Example> examples;
  int64_t tokens = 0;
};

/// Reads whole micro-batches. With a token limit one example is read ahead; state() is where that one still comes.
class BatchReader {
 public:
  BatchReader(data::ExampleStream& stream, const TrainConfig& config) : stream_(stream), config_(config) {}

  /// The micro-batches of a step; empty at the end of the stream. Several have about the same number of tokens: the
  /// step's examples, the longest first, each go to the one with the fewest, so that ranks wait little for each other.
  std::vector<MicroBatch> next_step();
  Json state() const { return ahead_ ? state_before_ : stream_.state(); }
  void set_state(const Json& state) { stream_.set_state(state); }

 private:
  std::optional<data::Example> take(const MicroBatch& batch);
  std::vector<MicroBatch> dealt(std::vector<MicroBatch> read) const;

  data::ExampleStream& stream_;
  const TrainConfig& config_;
  std::optional<data::Example> ahead_;
  Json state_before_;
};

/// What a model is given of a batch: prompts end where answers begin.
models::Text text_of(const data::Batch& batch, const std::vector<data::Example>& examples);

/// What a step gave, before the learning rate's schedule.
struct StepResult {
  double loss = 0;
  double aux_loss = 0;   // the routers' part, coefficients included
  double grad_norm = 0;  // before clipping
  int64_t tokens = 0, examples = 0;
};

/// Makes the steps of a run, each rank its micro-batches of them. What is random in a micro-batch follows from its
/// number, and gradients are added up as TreeSum does: the weights are the same whatever the number of ranks.
class Stepper {
 public:
  Stepper(models::LanguageModel& model, nn::Learner& learner, const TrainConfig& config,
          std::shared_ptr<ranks::Group> group);

  /// Gradients of the step's loss, clipped, and the update with learning rates times `factor`. `step` is its number
  /// from 1, `batches` all of its micro-batches. routing, when given, becomes the step's. Throws DataError, before any
  /// update, when loss or gradient is not finite.
  StepResult run(const std::vector<MicroBatch>& batches, int64_t step, double factor, moe::RoutingStats* routing);

  Optimizer& optimizer() { return *optimizer_; }

 private:
  torch::Tensor row_weights(const data::Batch& collated, const MicroBatch& batch, int64_t targets,
                            int64_t sequences) const;
  torch::Tensor routing_loss(const std::vector<nn::RoutingRecord>& records) const;
  std::pair<torch::Tensor, torch::Tensor> batch_loss(const data::Batch& collated, const MicroBatch& batch,
                                                     const torch::Tensor& weights, double share,
                                                     moe::RoutingStats* routing);
  [[noreturn]] void report_divergence(const std::vector<MicroBatch>& batches, int64_t step, const StepResult& result);

  models::LanguageModel& model_;
  const TrainConfig& config_;
  std::shared_ptr<ranks::Group> group_;
  std::vector<OptimizedTensor> tensors_;
  std::unique_ptr<Optimizer> optimizer_;
  ranks::TreeSum sum_;
  at::Generator generator_;  // of dropout and jitter; seeded by each micro-batch
};

}  // namespace moesaic::train
