// The sparse feed-forward half of Mixtral- and Switch-style models: a router and E whole networks, of which each token
// has k.
#pragma once
#include <torch/torch.h>

#include <string>
#include <vector>

#include "moesaic/moe/router.h"
#include "moesaic/nn/feed_forward.h"

namespace moesaic::moe {

struct SparseFfnConfig {
  int64_t hidden_size = 0, experts = 0, top_k = 0;
  int64_t width = 0;         // f of each expert
  bool renormalize = true;   // the weights of the chosen sum to 1
  int64_t shared_width = 0;  // of a network that every token has; 0 = none
  bool shared_gate = false;  // it is weighed by a sigmoid
  nn::GluKind activation = nn::GluKind::kSilu;
  nn::FeedForwardNames names{};    // of an expert's linears
  const char* router = "gate";     // its module; one in another after a point
  const char* expert_prefix = "";  // of an expert's name, before its number
  int64_t capacity = 0;            // tokens of one text that an expert takes; 0 = all
  double jitter = 0.0;             // of the router's input, while the router is trained
  int64_t cache_layer = -1;        // where the tokens that it had are remembered; -1: texts come whole
};

/// y = sum over the k chosen e of w_e FFN_e(x), and of the shared one FFN_s(x), or sigmoid(x w_s) FFN_s(x).
///
///   z = x W_r^T,  p = softmax(z) over all E,  chosen: the k largest,  w = p / sum of the chosen p, or p
///
/// x [N, d]; z, p and w are float32 whatever the model's number format. An expert multiplies the rows that chose it,
/// gathered, and nothing else. With a `capacity` C it has the first C tokens of each text that chose it; those behind
/// add 0 (Switch). Sources: Shazeer et al. 2017; Fedus et al., "Switch Transformers", 2021; Jiang et al., "Mixtral of
/// Experts", 2024. Differs: none of z, p and w is rounded to half precision (transformers does it for all but Mixtral
/// and Switch); a text that is decoded token by token fills the experts as one that is read at once (transformers
/// counts anew at every token).
struct SparseFfnImpl : nn::Ffn {
  SparseFfnImpl(const SparseFfnConfig& config, int64_t layer, const torch::TensorOptions& options);

  torch::Tensor forward(const torch::Tensor& x, nn::Pass& pass) override;
  void add_sites(const std::string& path, nn::Sites& sites) override;
  void quantize_int8() override;
  int64_t saved_per_row(bool whole) const override;
  bool trains() const override { return gate_->weight.requires_grad(); }

 private:
  torch::Tensor routed(const torch::Tensor& x, nn::Pass& pass);
  torch::Tensor within_capacity(const torch::Tensor& chosen, const nn::Pass& pass) const;

  Router router_;    // without its weight: that of gate_, in float32
  nn::Linear gate_;  // [E, d]
  std::string router_name_, expert_prefix_;
  int64_t capacity_, cache_layer_;
  double jitter_;
  std::vector<nn::FeedForward> experts_;
  nn::FeedForward shared_{nullptr};
  nn::Linear shared_gate_{nullptr};  // [1, d]
};
TORCH_MODULE(SparseFfn);

}  // namespace moesaic::moe
