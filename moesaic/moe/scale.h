// Scaled activations: (IA)^3 and MoV.
#pragma once
#include <torch/torch.h>

#include "moesaic/moe/router.h"
#include "moesaic/nn/site.h"

namespace moesaic::moe {

/// E learned vectors at one activation.
///
///   p = softmax(u W_r)             routing weights in float32 (E = 1: no router, p = 1)
///   m = sum_e p_e v_e              soft merging (residual top-k: m = 1 + sum_e p_e (v_e - 1))
///   y' = y * (1 + w scale (m - 1))
///
/// w: what the row's request gives the adapter (nn::Pass::mixture), 1 without one.
///
/// Head sites: y [N, H, k], v [E, H, k], one router [E, k] shared by the heads and read per head; or, not head-wise,
/// v [E, H*k] and a router [E, H*k] that reads all heads together. Flat sites: y [N, f], v [E, f], router [E, f]. With
/// E = 1 this is (IA)^3; vectors are [H, k] or [f]. Starts as the identity: v = 1. Source: arXiv 2309.05444;
/// docs/methods.md.
class ScaleExperts : public nn::ScaleAdapter {
 public:
  /// vectors: [E, H, k] or flat [E, f], float32; effect: 1 when training, the `:scale` of an adapter when inferring.
  ScaleExperts(torch::Tensor vectors, Router router, double effect);

  torch::Tensor forward(const torch::Tensor& y, nn::Pass& pass) override;
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass& pass) override;
  bool trains() const override { return vectors.requires_grad(); }
  int64_t saved_per_row() const override;

  torch::Tensor vectors;  // leaf
  Router router;
  int64_t column = -1;  // of the pass's mixture; -1 = none

 private:
  /// The merged scale for weights [N, E] or [N, H, E]: [N, f] or [N, H, k].
  torch::Tensor merge(const torch::Tensor& weights) const;
  torch::Tensor merged(const torch::Tensor& own_input, nn::Pass& pass) const;
  /// No row gives it a weight: its scale is one everywhere.
  bool unused(const nn::Pass& pass) const;
  /// Plain soft merging with nothing to watch and nothing to weigh: the fused functions apply.
  bool fused(const torch::Tensor& input, const nn::Pass& pass) const;

  double effect_;
};

}  // namespace moesaic::moe
