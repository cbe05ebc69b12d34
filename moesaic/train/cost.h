// How many operations a run takes, and how long that is on a processor that is not at hand.
#pragma once
#include <cstdint>
#include <string>

#include "moesaic/models/language_model.h"
#include "moesaic/nn/learner.h"

namespace moesaic::train {

/// A processor as its maker describes it: dense products with float32 sums, memory, its bandwidth.
struct Accelerator {
  const char* name;
  double bfloat16, float32;  // operations per second
  double bandwidth;          // bytes per second
  double memory;             // bytes
};
/// The one of that name; throws UsageError with the names there are.
const Accelerator& accelerator(const std::string& name);

/// The share of these figures that estimates assume a training to reach.
constexpr double kUtilisation = 0.4, kBandwidthShare = 0.7;

/// The mean micro-batch of a run.
struct MicroBatchShape {
  double examples, prompt_tokens, answer_tokens, targets;  // of all its examples together
};

struct Cost {
  double operations;  // additions and multiplications, each
  double bytes;       // of weights that are read
  /// max(operations / (kUtilisation * peak), bytes / (kBandwidthShare * bandwidth)).
  double seconds(const Accelerator& on, torch::ScalarType dtype) const;
};

/// What one micro-batch takes, forward and backward. Of a linear [out, in] and n rows: 2 n in out forward, as much for
/// the gradient of its input, and as much again where it is trained itself (or, with checkpointing, is run twice); 6 n
/// of every number of an adapter; an expert of a sparse model has k / E of the rows; attention 4 n m d forward (m: rows
/// that a row sees; half of them when causal) and twice that backward; the head over the targets. Of an encoder-decoder
/// each half reads its own tokens. Elementwise work is not counted. Works on the meta device.
Cost micro_batch_cost(models::LanguageModel& model, nn::Learner& learner, const MicroBatchShape& shape,
                      bool checkpointing);

}  // namespace moesaic::train
