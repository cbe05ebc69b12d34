// The gated feed-forward network.
#pragma once
#include <torch/torch.h>

#include <string>

#include "moesaic/nn/kernel_table.h"
#include "moesaic/nn/linear.h"
#include "moesaic/nn/site.h"

namespace moesaic::nn {

/// act(g) u, with gate_up = [g, u] [N, 2f] -> [N, f]. Saves gate_up only; the activation is recomputed in the backward
/// pass. float32 on the CPU runs fused.
/// Source: Shazeer, "GLU Variants Improve Transformer", 2020.
torch::Tensor gated_linear_unit(const torch::Tensor& gate_up, GluKind kind);

/// y = (act(x Wg) * (x Wu)) Wd.
struct FeedForwardImpl : torch::nn::Module {
  FeedForwardImpl(int64_t hidden_size, int64_t intermediate_size, bool bias, GluKind kind, int64_t layer,
                  const torch::TensorOptions& options);

  /// x: [N, d] -> [N, d].
  torch::Tensor forward(const torch::Tensor& x, ForwardContext& context);
  /// Appends the sites; `path` is the module path, "model.layers.0.mlp".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8();

 private:
  torch::Tensor product(const torch::Tensor& gate_up, ForwardContext& context) const;

  GluKind kind_;
  int64_t layer_;
  LinearGroup gate_up_, down_;
  ScaleSlot branch_slot_;                      // act(gate)
  ScaleSlot gate_slot_, up_slot_, down_slot_;  // outputs of the linears
};
TORCH_MODULE(FeedForward);

}  // namespace moesaic::nn
