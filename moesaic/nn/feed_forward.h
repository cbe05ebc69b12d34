// The feed-forward network, gated or not.
#pragma once
#include <torch/torch.h>

#include <string>

#include "moesaic/nn/block.h"
#include "moesaic/nn/kernel_table.h"
#include "moesaic/nn/linear.h"

namespace moesaic::nn {

/// act(g) u, with gate_up = [g, u] [N, 2f] -> [N, f]. Saves gate_up only; the activation is recomputed in the backward
/// pass. float32 on the CPU runs fused.
/// Source: Shazeer, "GLU Variants Improve Transformer", 2020.
torch::Tensor gated_linear_unit(const torch::Tensor& gate_up, GluKind kind);

/// The checkpoint's names of its linears; up = nullptr: it is not gated.
struct FeedForwardNames {
  const char *gate = "gate_proj", *up = "up_proj", *down = "down_proj";
};

/// y = (act(x Wg) * (x Wu)) Wd; not gated: y = act(x Wg) Wd.
struct FeedForwardImpl : torch::nn::Module, Ffn {
  FeedForwardImpl(int64_t hidden_size, int64_t intermediate_size, bool bias, GluKind kind, int64_t layer,
                  const torch::TensorOptions& options, const FeedForwardNames& names = {});

  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override;
  void add_sites(const std::string& path, Sites& sites) override;
  void quantize_int8() override;
  int64_t saved_per_row(bool whole) const override;

 private:
  torch::Tensor branch(const torch::Tensor& x, Pass& pass);

  bool gated() const { return names_.up != nullptr; }

  FeedForwardNames names_;
  GluKind kind_;
  int64_t layer_;
  LinearGroup gate_up_, down_;
  ScaleSlot branch_slot_;  // act(gate)
};
TORCH_MODULE(FeedForward);

}  // namespace moesaic::nn
