// One layer of an encoder or of a decoder that reads one, as T5 builds them.
#pragma once
#include <torch/torch.h>

#include <string>

#include "moesaic/nn/attention.h"
#include "moesaic/nn/feed_forward.h"
#include "moesaic/nn/sited_block.h"

namespace moesaic::nn {

struct Seq2SeqBlockConfig {
  SelfAttentionConfig attention;        // sizes, bias and names; causal in a decoder
  bool reads_source = false;            // a decoder's: it has cross-attention
  int64_t intermediate_size = 0;        // width of the feed-forward network
  GluKind activation = GluKind::kRelu;  // of the feed-forward network
  FeedForwardNames ffn_names{};         // up = nullptr: not gated
};

/// h = h + attention(norm(h));  h = h + cross_attention(norm(h), source), in a decoder;  h = h + ffn(norm(h)).
struct Seq2SeqBlockImpl : torch::nn::Module, SitedBlock {
  /// index: its place in the model, the decoder's behind the encoder's.
  Seq2SeqBlockImpl(const Seq2SeqBlockConfig& config, int64_t index, const torch::TensorOptions& options);

  torch::Tensor forward(const torch::Tensor& h, Pass& pass) override;
  int64_t saved_bytes(int64_t rows) const override;
  /// Appends the sites; `path` is the module path, "encoder.block.0".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8() override;

 private:
  std::vector<RmsNorm> norms_;  // before each part
  SelfAttention self_attention_{nullptr};
  CrossAttention cross_attention_{nullptr};
  FeedForward ffn_{nullptr};
};
TORCH_MODULE(Seq2SeqBlock);

}  // namespace moesaic::nn
