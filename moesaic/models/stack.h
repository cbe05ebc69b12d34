// What decoder-only models and both halves of encoder-decoders are built of.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <vector>

#include "moesaic/nn/block.h"
#include "moesaic/nn/norm.h"
#include "moesaic/nn/rope.h"

namespace moesaic::models {

/// An embedding, blocks and a final norm.
struct Stack {
  torch::Tensor embedding;       // [V, d]
  double embedding_scale = 1.0;  // rounded to the weights' precision
  std::vector<nn::Block*> blocks;
  nn::RmsNorm norm{nullptr};
  std::unique_ptr<nn::Rope> rope, rope_local;  // of global blocks, and of sliding ones with their own base
};

}  // namespace moesaic::models
