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
/// With `row_weights` w [N] float32: w_n act(g_n) u_n, differentiable in w.
torch::Tensor gated_linear_unit(const torch::Tensor& gate_up, GluKind kind, const torch::Tensor& row_weights = {});

/// The checkpoint's names of its linears; up = nullptr: it is not gated.
struct FeedForwardNames {
  const char *gate = "gate_proj", *up = "up_proj", *down = "down_proj";
};

/// y = (act(x Wg) * (x Wu)) Wd; not gated: y = act(x Wg) Wd.
struct FeedForwardImpl : Ffn {
  FeedForwardImpl(int64_t hidden_size, int64_t intermediate_size, bool bias, GluKind kind, int64_t layer,
                  const torch::TensorOptions& options, const FeedForwardNames& names = {});

  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override { return forward(x, pass, {}); }
  /// w_n y_n for `row_weights` w [N] float32; undefined: y. Without biases, for w enters before Wd.
  torch::Tensor forward(const torch::Tensor& x, Pass& pass, const torch::Tensor& row_weights);
  void add_sites(const std::string& path, Sites& sites) override;
  void quantize_int8() override;
  int64_t saved_per_row(bool whole) const override;
  /// An adapter acts at one of its sites.
  bool adapted() const;

 private:
  torch::Tensor branch(const torch::Tensor& x, Pass& pass, const torch::Tensor& row_weights);

  bool gated() const { return names_.up != nullptr; }

  FeedForwardNames names_;
  GluKind kind_;
  int64_t layer_;
  LinearGroup gate_up_, down_;
  ScaleSlot branch_slot_;  // act(gate)
};
TORCH_MODULE(FeedForward);

}  // namespace moesaic::nn
