// How much memory a run will need, before it starts.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "moesaic/models/language_model.h"
#include "moesaic/nn/learner.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// Bytes by use.
struct MemoryEstimate {
  std::vector<std::pair<std::string, int64_t>> parts;
  int64_t total() const;
};

/// What training holds at its peak: the program itself, the frozen weights, the trained tensors with gradients and
/// optimizer state, the activations that the backward pass needs, the loss's chunk and the largest block's scratch.
///
/// tokens, targets: of the largest micro-batch; device: where the run will be. Works on a model of the meta device.
MemoryEstimate estimate_memory(models::LanguageModel& model, nn::Learner& learner, const TrainConfig& config,
                               int64_t tokens, int64_t targets, torch::Device device);

/// Gives tensors of a MiB and more pages of their own, which go back when they are freed, where half precision is
/// multiplied in float32 stretches (nn::multiplies_wide): the heap keeps holes of 13 % of a training's peak there. For
/// the rest of the process. Elsewhere it does nothing: faster products would feel the page faults (measured 10 %).
void avoid_heap_holes(torch::ScalarType dtype, torch::Device device);

}  // namespace moesaic::train
