// Scaled activations: (IA)^3 and MoV at keys, values and the FFN branch.
#pragma once
#include "moesaic/moe/router.h"
#include "moesaic/nn/linear.h"

namespace moesaic::moe {

/// E learned vectors at one activation.
///
///   p = softmax(u W_r)             routing weights in float32 (E = 1: no router, p = 1)
///   m = sum_e p_e v_e              soft merging (residual top-k: m = 1 + sum_e p_e (v_e - 1))
///   y' = y * (1 + scale (m - 1))
///
/// Head sites: y [N, H, k], v [E, H, k], one router [E, k] shared by the heads and read per head; or, not head-wise,
/// v [E, H*k] and a router [E, H*k] that reads all heads together. Flat sites: y [N, f], v [E, f], router [E, f]. With
/// E = 1 this is (IA)^3; vectors are [H, k] or [f]. Starts as the identity: v = 1. Source: arXiv 2309.05444;
/// docs/methods.md.
class ScaleExperts : public nn::ScaleAdapter {
 public:
  /// vectors: [E, H, k] or flat [E, f], float32; effect: 1 when training, the `:scale` of an adapter when inferring.
  ScaleExperts(torch::Tensor vectors, Router router, double effect);

  torch::Tensor forward(const torch::Tensor& y, nn::ForwardContext& context) override;
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::ForwardContext& context) override;

  torch::Tensor vectors;  // leaf
  Router router;

 private:
  /// The merged scale for weights [N, E] or [N, H, E]: [N, f] or [N, H, k].
  torch::Tensor merge(const torch::Tensor& weights) const;
  torch::Tensor merged(const torch::Tensor& own_input, nn::ForwardContext& context) const;

  double effect_;
};

/// Scaled inputs of a group's linears: y_j = W_j (x * m_j) + b_j for every member j that has vectors, the base product
/// for the others. PEFT's (IA)^3 at `feedforward_modules`; for mixtures m_j's router reads x.
///
/// x: [N, in]; returns [N, sum of out]. Several adapters may scale one member, each what the one before made.
class InputScales : public nn::GroupAdapter {
 public:
  /// The group's object, made when it has none. Throws UsageError when it carries another kind of adapter.
  static std::shared_ptr<InputScales> of(nn::LinearGroup& group);

  void add(int64_t index, std::shared_ptr<ScaleExperts> experts) { members_.emplace_back(index, std::move(experts)); }
  /// Removes them; the group's slot is emptied with the last.
  void remove(const std::shared_ptr<ScaleExperts>& experts, nn::LinearGroup& group);

  torch::Tensor forward(const torch::Tensor& x, const nn::LinearGroup& group, nn::ForwardContext& context) override;

 private:
  std::vector<std::pair<int64_t, std::shared_ptr<ScaleExperts>>> members_;  // index in the group
};

}  // namespace moesaic::moe
