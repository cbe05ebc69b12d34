// Activation checkpointing: a decoder layer that keeps only its input and runs again in the backward pass.
#pragma once
#include <functional>

#include "moesaic/models/causal_lm.h"

namespace moesaic::train {

/// What of a layer's routing enters the loss: a scalar over its records (undefined when there are none).
using RoutingLoss = std::function<torch::Tensor(const std::vector<nn::RoutingRecord>&)>;

struct LayerResult {
  torch::Tensor hidden;        // [N, d]
  torch::Tensor routing_loss;  // scalar, 0 without records
};

/// run_layers(h, layer, layer + 1) and `routing_loss` over its records. Nothing inside the layer is kept: the backward
/// pass runs it again with the random state (dropout, jitter) of the first run. When `context.routing` is set the first
/// run's records are appended to it, detached; `routing_loss` then sees them in both runs.
LayerResult run_layer_checkpointed(models::CausalLM& model, int64_t layer, const torch::Tensor& hidden,
                                   nn::ForwardContext& context, const RoutingLoss& routing_loss);

/// The state of the default generator of `device` (and of the CPU's when that is another), and back.
std::vector<torch::Tensor> random_state(torch::Device device);
void set_random_state(torch::Device device, const std::vector<torch::Tensor>& state);

}  // namespace moesaic::train
