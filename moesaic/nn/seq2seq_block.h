// One layer of an encoder or of a decoder that reads one, as T5 builds them.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <string>

#include "moesaic/nn/attention.h"
#include "moesaic/nn/sited_block.h"

namespace moesaic::nn {

struct Seq2SeqBlockConfig {
  SelfAttentionConfig attention;  // sizes, bias and names; causal in a decoder
  bool reads_source = false;      // a decoder's: it has cross-attention
};

/// h = h + attention(norm(h));  h = h + cross_attention(norm(h), source), in a decoder;  h = h + ffn(norm(h)). While
/// training with dropout what is added is dropped, too.
struct Seq2SeqBlockImpl : torch::nn::Module, SitedBlock {
  /// `ffn` is its last part, `ffn_name` what the checkpoint calls it. index: its place in the model, the decoder's
  /// behind the encoder's.
  Seq2SeqBlockImpl(const Seq2SeqBlockConfig& config, std::shared_ptr<Ffn> ffn, const std::string& ffn_name,
                   int64_t index, const torch::TensorOptions& options);

  torch::Tensor forward(const torch::Tensor& h, Pass& pass) override;
  int64_t saved_bytes(int64_t rows) const override;
  bool trains() const override { return SitedBlock::trains() || ffn_->trains(); }
  /// Appends the sites; `path` is the module path, "encoder.block.0".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8() override;

 private:
  std::vector<RmsNorm> norms_;  // before each part
  SelfAttention self_attention_{nullptr};
  CrossAttention cross_attention_{nullptr};
  std::shared_ptr<Ffn> ffn_;
  std::string ffn_name_;
};
TORCH_MODULE(Seq2SeqBlock);

}  // namespace moesaic::nn
