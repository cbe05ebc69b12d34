#include "moesaic/nn/seq2seq_block.h"

#include "moesaic/nn/dropout.h"

namespace moesaic::nn {

Seq2SeqBlockImpl::Seq2SeqBlockImpl(const Seq2SeqBlockConfig& config, std::shared_ptr<Ffn> ffn,
                                   const std::string& ffn_name, int64_t index, const torch::TensorOptions& options)
    : SitedBlock(index), ffn_name_(ffn_name) {
  const SelfAttentionConfig& attention = config.attention;
  const auto layer = register_module("layer", std::make_shared<torch::nn::Module>());
  auto add_part = [&](const char* name, auto part) {
    const auto half = layer->register_module(std::to_string(norms_.size()), std::make_shared<torch::nn::Module>());
    half->register_module(name, part);
    norms_.push_back(half->register_module(
        "layer_norm", RmsNorm(attention.hidden_size, attention.norm_eps, attention.norm_offset, options)));
    return part;
  };
  self_attention_ = add_part("SelfAttention", SelfAttention(attention, index, options));
  if (config.reads_source) {
    SelfAttentionConfig cross = attention;
    cross.options.causal = false;
    cross.options.bias = nullptr;
    cross_attention_ = add_part("EncDecAttention", CrossAttention(cross, index, options));
  }
  ffn_ = add_part(ffn_name.c_str(), std::move(ffn));
  add_sites("", sites_);
}

torch::Tensor Seq2SeqBlockImpl::forward(const torch::Tensor& h, Pass& pass) {
  torch::Tensor y = h;
  size_t part = 0;
  auto normed = [&] { return pass.layer_input = norms_[part++]->forward(y); };
  y = y + drop_columns(self_attention_->forward(normed(), pass), pass);
  if (cross_attention_) y = y + drop_columns(cross_attention_->forward(normed(), pass), pass);
  return y + drop_columns(ffn_->forward(normed(), pass), pass);
}

void Seq2SeqBlockImpl::add_sites(const std::string& path, Sites& sites) {
  int64_t part = 0;
  auto next = [&](const std::string& name) { return fmt::format("{}.layer.{}.{}", path, part++, name); };
  self_attention_->add_sites(next("SelfAttention"), sites);
  if (cross_attention_) cross_attention_->add_sites(next("EncDecAttention"), sites);
  ffn_->add_sites(next(ffn_name_), sites);
}

void Seq2SeqBlockImpl::quantize_int8() {
  self_attention_->quantize_int8();
  if (cross_attention_) cross_attention_->quantize_int8();
  ffn_->quantize_int8();
}

int64_t Seq2SeqBlockImpl::saved_bytes(int64_t rows) const {
  const torch::Tensor& weight = norms_.front()->weight;
  const bool whole = weight.requires_grad();
  int64_t numbers = static_cast<int64_t>(norms_.size()) * weight.size(0);  // inputs of the norms
  numbers += self_attention_->saved_per_row(whole) + ffn_->saved_per_row(whole) + saved_by_scales();
  if (cross_attention_) numbers += cross_attention_->saved_per_row(whole);
  return numbers * rows * static_cast<int64_t>(weight.element_size());
}

}  // namespace moesaic::nn
