#include "moesaic/nn/decoder_layer.h"

namespace moesaic::nn {

DecoderLayerImpl::DecoderLayerImpl(const DecoderLayerConfig& config, int64_t layer, const torch::TensorOptions& options)
    : layer_(layer) {
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
  add_sites("", sites_);
}

torch::Tensor DecoderLayerImpl::forward(const torch::Tensor& h, Pass& pass) {
  const bool post = !post_feedforward_layernorm_.is_empty();
  pass.layer_input = input_layernorm_->forward(h);
  torch::Tensor mixed = self_attn_->forward(pass.layer_input, pass);
  if (post) mixed = post_attention_layernorm_->forward(mixed);
  const torch::Tensor middle = h + mixed;

  RmsNorm& before = post ? pre_feedforward_layernorm_ : post_attention_layernorm_;
  pass.layer_input = before->forward(middle);
  torch::Tensor expanded = mlp_->forward(pass.layer_input, pass);
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

bool DecoderLayerImpl::trains() const {
  return std::any_of(sites_.linears.begin(), sites_.linears.end(),
                     [](const LinearSite& site) { return site.group->trains(); }) ||
         std::any_of(sites_.scales.begin(), sites_.scales.end(),
                     [](const ScaleSite& site) { return site.slot->trains(); });
}

int64_t DecoderLayerImpl::saved_bytes(int64_t rows) const {
  const torch::Tensor& weight = input_layernorm_->weight;
  const bool whole = weight.requires_grad();
  const int64_t d = weight.size(0);
  int64_t numbers = 2 * d;  // inputs of the two norms
  if (!post_feedforward_layernorm_.is_empty()) numbers += 2 * d;
  numbers += self_attn_->saved_per_row(whole) + mlp_->saved_per_row(whole);
  int64_t projection = 0;  // what a scaled head activation is a view of
  for (const LinearSite& site : sites_.linears) {
    if (site.role == Role::kQuery || site.role == Role::kKey || site.role == Role::kValue) projection += site.out;
  }
  for (const ScaleSite& site : sites_.scales) {
    if (site.slot->adapters.empty()) continue;
    numbers += site.slot->saved_per_row() + (site.heads > 0 ? projection / 2 : site.width);
  }
  return numbers * rows * static_cast<int64_t>(weight.element_size());
}

/// The gradients of gate and up, of the branch's product and of the layer's input.
int64_t DecoderLayerImpl::scratch_per_row() const {
  int64_t widest = 0;
  for (const LinearSite& site : sites_.linears) {
    if (site.role == Role::kDown) widest = site.in;
  }
  return 3 * widest + 3 * input_layernorm_->weight.size(0);
}

}  // namespace moesaic::nn
