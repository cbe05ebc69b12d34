// Routers: what weight each expert has for each row. Written once for MoV, MoLoRA and sparse MoE.
#pragma once
#include <torch/torch.h>

#include <optional>
#include <string>

#include "moesaic/nn/pass.h"

namespace moesaic::moe {

enum class TopkMode { kMask, kRenorm, kResidual };
enum class RouterInput { kToken, kSentence, kLayerInput, kFfnProduct };

/// How logits become weights.
struct RouterOptions {
  RouterInput input = RouterInput::kToken;  // what it reads
  int64_t top_k = 0;                        // 0 = soft merging over all experts
  TopkMode topk_mode = TopkMode::kMask;     // what becomes of the kept weights
  double jitter = 0.0;                      // multiplicative uniform(1-j, 1+j) on the router's input while training
  double temperature = 1.0;                 // divides the logits
  bool absolute = false;                    // logits are |u W_r^T| / temperature
  /// Soft merging from the site's own input with nothing that changes logits: the fused paths apply.
  bool plain() const { return input == RouterInput::kToken && top_k == 0 && jitter == 0.0 && !absolute; }
};

/// What each row has of the experts.
struct Choice {
  torch::Tensor experts;  // [N, k] int64
  torch::Tensor weights;  // [N, k] float32
};

/// A site's router: logits = fp32(u) W_r^T / temperature, or their magnitude.
struct Router {
  torch::Tensor weight;  // [E, d_u] float32; undefined when there is one expert
  RouterOptions options;
  std::string owner{};  // see nn::RoutingRecord
  std::string site{};
  int64_t layer = 0;

  bool defined() const { return weight.defined(); }
  /// u: [..., d_u] of any float dtype -> [..., E] float32.
  torch::Tensor logits(const torch::Tensor& u, const nn::Pass& pass) const;
  /// logits [M, E] -> weights [M, E]; records them when the pass collects routing.
  /// rows_per_token: see nn::RoutingRecord.
  torch::Tensor route(const torch::Tensor& logits, nn::Pass& pass, int64_t rows_per_token) const;
  /// The experts of each row and their weights, logits [N, E] -> [N, k] each: what `route` keeps, without the others.
  Choice choose(const torch::Tensor& logits, nn::Pass& pass) const;
  /// The router's input at this site when it is not the site's own: layer_input [N, d] or one sentence row per token.
  /// Weights of shape [N, E] for the inputs `layer_input` and `sentence`. Throws UsageError without sentence vectors.
  torch::Tensor route_from_pass(nn::Pass& pass) const;
};

/// The k most probable experts of each row, by falling probability; of equals the lower number first.
/// probs: [..., E] -> [..., k] int64.
torch::Tensor top_experts(const torch::Tensor& probs, int64_t k);

/// Weights after top-k, from probabilities over all experts.
///
///   mask      w = p on the k largest, 0 elsewhere (the reference; the kept mass is below 1)
///   renorm    the same divided by the kept mass
///   residual  as mask; a scale then is 1 + sum w (v - 1), see scale.h
///
/// probs: [..., E]. k = 0 or k = E returns probs.
/// Source: docs/methods.md.
torch::Tensor topk_weights(const torch::Tensor& probs, int64_t k, TopkMode mode);

/// E * sum_e f_e P_e; 1 when balanced. f_e: share of the routed slots expert e got (its top-k slots; its top-1 share
/// when every expert is kept, since the masked fractions would be constant), P_e: mean probability.
/// Differentiable through P_e. Source: Switch Transformer, eq. 4; rows are tokens only, no padding exists.
torch::Tensor balance_loss(const nn::RoutingRecord& record);

/// mean over rows of logsumexp(logits)^2. Source: ST-MoE, eq. 5.
torch::Tensor z_loss(const nn::RoutingRecord& record);

TopkMode parse_topk_mode(const std::string& name);
RouterInput parse_router_input(const std::string& name);

}  // namespace moesaic::moe
