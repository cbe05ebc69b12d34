// One layer of a decoder-only model.
#pragma once
#include "moesaic/nn/attention.h"
#include "moesaic/nn/feed_forward.h"

namespace moesaic::nn {

struct DecoderLayerConfig {
  SelfAttentionConfig attention;
  int64_t intermediate_size = 0;
  bool mlp_bias = false;
  GluKind activation = GluKind::kSilu;
  bool pre_post_norms = false;  // norms before and after both halves (Gemma 3)
};

/// h = h + attention(norm(h));  h = h + ffn(norm(h)). With pre_post_norms each half's output is normed too, before it
/// is added.
struct DecoderLayerImpl : torch::nn::Module {
  DecoderLayerImpl(const DecoderLayerConfig& config, int64_t layer, const torch::TensorOptions& options);

  /// h: [N, d] -> [N, d].
  torch::Tensor forward(const torch::Tensor& h, ForwardContext& context);
  /// Appends the sites; `path` is the module path, "model.layers.0".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8();

 private:
  RmsNorm input_layernorm_{nullptr}, post_attention_layernorm_{nullptr};
  RmsNorm pre_feedforward_layernorm_{nullptr}, post_feedforward_layernorm_{nullptr};
  SelfAttention self_attn_{nullptr};
  FeedForward mlp_{nullptr};
};
TORCH_MODULE(DecoderLayer);

}  // namespace moesaic::nn
