#include "moesaic/nn/decoder_layer.h"

namespace moesaic::nn {

DecoderLayerImpl::DecoderLayerImpl(const DecoderLayerConfig& config, std::shared_ptr<Ffn> ffn,
                                   const std::string& ffn_name, int64_t layer, const torch::TensorOptions& options)
    : SitedBlock(layer), ffn_name_(ffn_name), residual_scale_(config.residual_scale) {
  const SelfAttentionConfig& attention = config.attention;
  auto norm = [&](const char* name) {
    return register_module(name, RmsNorm(attention.hidden_size, attention.norm_eps, attention.norm_offset, options));
  };
  input_layernorm_ = norm(config.before_attention);
  if (config.merged) {
    merged_attn_ = register_module("self_attn", MergedAttention(attention, layer, options));
  } else {
    self_attn_ = register_module("self_attn", SelfAttention(attention, layer, options));
  }
  post_attention_layernorm_ = norm(config.behind_attention);
  if (config.cross) {
    pre_cross_attn_layernorm_ = norm("pre_cross_attn_layernorm");
    cross_attn_ = register_module("cross_attn", CrossAttention(*config.cross, layer, options));
    post_cross_attn_layernorm_ = norm("post_cross_attn_layernorm");
  }
  if (config.pre_post_norms) {
    pre_feedforward_layernorm_ = norm("pre_feedforward_layernorm");
    post_feedforward_layernorm_ = norm("post_feedforward_layernorm");
  }
  ffn_ = register_module(ffn_name, std::move(ffn));
  add_sites("", sites_);
}

torch::Tensor DecoderLayerImpl::forward(const torch::Tensor& h, Pass& pass) {
  const bool post = !post_feedforward_layernorm_.is_empty();
  pass.layer_input = input_layernorm_->forward(h);
  torch::Tensor mixed =
      merged_attn_ ? merged_attn_->forward(pass.layer_input, pass) : self_attn_->forward(pass.layer_input, pass);
  if (post) mixed = post_attention_layernorm_->forward(mixed);
  torch::Tensor middle = at::add(h, mixed, residual_scale_);
  if (cross_attn_) {
    pass.layer_input = pre_cross_attn_layernorm_->forward(middle);
    middle = middle + post_cross_attn_layernorm_->forward(cross_attn_->forward(pass.layer_input, pass));
  }

  RmsNorm& before = post ? pre_feedforward_layernorm_ : post_attention_layernorm_;
  pass.layer_input = before->forward(middle);
  torch::Tensor expanded = ffn_->forward(pass.layer_input, pass);
  if (post) expanded = post_feedforward_layernorm_->forward(expanded);
  return at::add(middle, expanded, residual_scale_);
}

void DecoderLayerImpl::add_sites(const std::string& path, Sites& sites) {
  if (merged_attn_) {
    merged_attn_->add_sites(path + ".self_attn", sites);
  } else {
    self_attn_->add_sites(path + ".self_attn", sites);
  }
  if (cross_attn_) cross_attn_->add_sites(path + ".cross_attn", sites);
  ffn_->add_sites(path + "." + ffn_name_, sites);
}

void DecoderLayerImpl::quantize_int8() {
  if (merged_attn_) {
    merged_attn_->quantize_int8();
  } else {
    self_attn_->quantize_int8();
  }
  if (cross_attn_) cross_attn_->quantize_int8();
  ffn_->quantize_int8();
}

int64_t DecoderLayerImpl::saved_bytes(int64_t rows) const {
  const torch::Tensor& weight = input_layernorm_->weight;
  const bool whole = weight.requires_grad();
  const int64_t d = weight.size(0);
  int64_t numbers = 2 * d;  // inputs of the two norms
  if (!post_feedforward_layernorm_.is_empty()) numbers += 2 * d;
  if (cross_attn_) numbers += 2 * d + cross_attn_->saved_per_row(whole);
  numbers += merged_attn_ ? merged_attn_->saved_per_row(whole) : self_attn_->saved_per_row(whole);
  numbers += ffn_->saved_per_row(whole) + saved_by_scales();
  return numbers * rows * static_cast<int64_t>(weight.element_size());
}

}  // namespace moesaic::nn
