// Activation checkpointing: blocks that keep only their input and run again in the backward pass.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <vector>

#include "moesaic/nn/block.h"

namespace moesaic::train {

/// What of a block's routing enters the loss: a scalar over its records (undefined when there are none).
using RoutingLoss = std::function<torch::Tensor(const std::vector<nn::RoutingRecord>&)>;

/// Pass::run for a training pass. Nothing inside a block that has a graph is kept: the backward pass runs it again with
/// the random state (dropout, jitter) of the first run. When `pass.routing` is set the first run's records are appended
/// to it, detached; `routing_loss` sees them in both runs, and its sum over all blocks is `loss()`.
class CheckpointedBlocks {
 public:
  explicit CheckpointedBlocks(RoutingLoss routing_loss) : routing_loss_(std::move(routing_loss)) {}
  torch::Tensor run(nn::Block& block, const torch::Tensor& hidden, nn::Pass& pass);
  /// Undefined before the first block with a graph.
  const torch::Tensor& loss() const { return loss_; }

 private:
  RoutingLoss routing_loss_;
  torch::Tensor loss_;
};

}  // namespace moesaic::train
