// How much memory a run will need, before it starts.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// Bytes by use.
struct MemoryEstimate {
  std::vector<std::pair<std::string, int64_t>> parts;
  int64_t total() const;
};

/// What training holds at its peak: the program itself, the frozen weights, the trained tensors with gradients and
/// optimizer state, the activations that the backward pass needs, the loss's chunk and the largest layer's scratch.
///
/// tokens, targets: of the largest micro-batch. Derived from what the autograd functions of nn and moe save, per row.
/// Works on a model of the meta device.
MemoryEstimate estimate_memory(models::CausalLM& model, adapters::Adapter* adapter, const TrainConfig& config,
                               int64_t tokens, int64_t targets, torch::ScalarType dtype, torch::Device device);

/// The same for a composition, whose models are loaded; each augmenting model is taken to read as many tokens as the
/// anchor. The cache of frozen states is a part of its own, at its limit.
MemoryEstimate estimate_memory(compose::Composition& composition, const TrainConfig& config, int64_t tokens,
                               int64_t targets);

}  // namespace moesaic::train
