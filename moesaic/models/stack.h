// What decoder-only models and both halves of encoder-decoders are built of.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/models/decoder_config.h"
#include "moesaic/nn/decoder_layer.h"
#include "moesaic/nn/norm.h"
#include "moesaic/nn/rope.h"

namespace moesaic::models {

/// An embedding, blocks and a final norm.
struct Stack {
  torch::Tensor embedding;       // [V, d]
  double embedding_scale = 1.0;  // rounded to the weights' precision
  torch::Tensor image_end;       // [d]: the embedding of the token `image_end_id` in place of its own; undefined: none
  int64_t image_end_id = -1;
  std::vector<nn::Block*> blocks;
  nn::RmsNorm norm{nullptr};
  std::unique_ptr<nn::Rope> rope, rope_local;  // of global blocks, and of sliding ones with their own base

  /// Fills offsets, positions, segments and rotary tables of `pass` (positions start at pass.cache's lengths).
  void prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const;
  /// [N] tokens -> [N, d] embeddings.
  torch::Tensor embed(const torch::Tensor& tokens) const;
};

/// The stack of a config under `module`, whose path is `path`: "embed_tokens", "layers", "norm". Layers count from
/// `first_index`; `adapt` may change what the config says of one. `embedding`: another stack's, in place of its own.
Stack make_stack(torch::nn::Module& module, const std::string& path, const DecoderConfig& config, int64_t first_index,
                 const std::function<void(nn::DecoderLayerConfig& layer, int64_t i)>& adapt,
                 const torch::TensorOptions& options, nn::Sites& sites, const torch::Tensor& embedding = {});

}  // namespace moesaic::models
