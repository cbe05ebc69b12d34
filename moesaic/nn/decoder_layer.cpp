#include "moesaic/nn/decoder_layer.h"

namespace moesaic::nn {

DecoderLayerImpl::DecoderLayerImpl(const DecoderLayerConfig& config, int64_t layer,
                                   const torch::TensorOptions& options) {
  const SelfAttentionConfig& attention = config.attention;
  auto norm = [&](const char* name) {
    return register_module(name, RmsNorm(attention.hidden_size, attention.norm_eps, attention.norm_offset, options));
  };
  input_layernorm_ = norm("input_layernorm");
  self_attn_ = register_module("self_attn", SelfAttention(attention, layer, options));
  post_attention_layernorm_ = norm("post_attention_layernorm");
  if (config.pre_post_norms) {
    pre_feedforward_layernorm_ = norm("pre_feedforward_layernorm");
    post_feedforward_layernorm_ = norm("post_feedforward_layernorm");
  }
  mlp_ = register_module("mlp", FeedForward(attention.hidden_size, config.intermediate_size, config.mlp_bias,
                                            config.activation, layer, options));
}

torch::Tensor DecoderLayerImpl::forward(const torch::Tensor& h, ForwardContext& context) {
  const bool post = !post_feedforward_layernorm_.is_empty();
  context.layer_input = input_layernorm_->forward(h);
  torch::Tensor mixed = self_attn_->forward(context.layer_input, context);
  if (post) mixed = post_attention_layernorm_->forward(mixed);
  const torch::Tensor middle = h + mixed;

  RmsNorm& before = post ? pre_feedforward_layernorm_ : post_attention_layernorm_;
  context.layer_input = before->forward(middle);
  torch::Tensor expanded = mlp_->forward(context.layer_input, context);
  if (post) expanded = post_feedforward_layernorm_->forward(expanded);
  return middle + expanded;
}

void DecoderLayerImpl::add_sites(const std::string& path, Sites& sites) {
  self_attn_->add_sites(path + ".self_attn", sites);
  mlp_->add_sites(path + ".mlp", sites);
}

void DecoderLayerImpl::quantize_int8() {
  self_attn_->quantize_int8();
  mlp_->quantize_int8();
}

}  // namespace moesaic::nn
