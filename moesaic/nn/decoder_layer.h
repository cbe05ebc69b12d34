// One layer of a decoder-only model, or of an encoder-decoder built like one.
#pragma once
#include <torch/torch.h>

#include <optional>
#include <string>

#include "moesaic/nn/attention.h"
#include "moesaic/nn/sited_block.h"

namespace moesaic::nn {

struct DecoderLayerConfig {
  SelfAttentionConfig attention;  // sizes and switches of its first half
  bool pre_post_norms = false;    // norms before and after both halves (Gemma 2 and 3)
  double residual_scale = 1.0;    // what each half is multiplied by before it is added (Granite)
  const char *before_attention = "input_layernorm", *behind_attention = "post_attention_layernorm";  // norms' names
  std::optional<SelfAttentionConfig> cross{};  // of the encoder's states, with norms on both sides
  bool merged = false;                         // the first half reads them, too
};

/// h = h + attention(norm(h));  h = h + cross_attention(norm(h), source), where there is one;  h = h + ffn(norm(h)).
/// With pre_post_norms each part's output is normed too, before it is added.
struct DecoderLayerImpl : torch::nn::Module, SitedBlock {
  /// `ffn` is its second half, `ffn_name` what the checkpoint calls it.
  DecoderLayerImpl(const DecoderLayerConfig& config, std::shared_ptr<Ffn> ffn, const std::string& ffn_name,
                   int64_t layer, const torch::TensorOptions& options);

  torch::Tensor forward(const torch::Tensor& h, Pass& pass) override;
  int64_t saved_bytes(int64_t rows) const override;
  bool trains() const override { return SitedBlock::trains() || ffn_->trains(); }
  /// Appends the sites; `path` is the module path, "model.layers.0".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8() override;

 private:
  RmsNorm input_layernorm_{nullptr}, post_attention_layernorm_{nullptr};
  RmsNorm pre_cross_attn_layernorm_{nullptr}, post_cross_attn_layernorm_{nullptr};
  RmsNorm pre_feedforward_layernorm_{nullptr}, post_feedforward_layernorm_{nullptr};
  SelfAttention self_attn_{nullptr};
  MergedAttention merged_attn_{nullptr};  // in its place
  CrossAttention cross_attn_{nullptr};
  std::shared_ptr<Ffn> ffn_;
  std::string ffn_name_;
  double residual_scale_;
};
TORCH_MODULE(DecoderLayer);

}  // namespace moesaic::nn
