// One learned connection from a block of an augmenting model to a block of the anchor.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "moesaic/nn/linear.h"
#include "moesaic/nn/norm.h"

namespace moesaic::compose {

/// What all connections of a composition share.
struct ConnectionConfig {
  int64_t num_heads = 1;                // of width D_B / num_heads
  std::string cross_position = "rope";  // rope | none (the paper)
  std::string norm = "pre";             // pre (H_A and H_B at unit RMS) | none (paper) | post (released: RMSNorm on Y)
  bool attention_bias = false;          // biases at q, k, v, o (the released code)
  double norm_eps = 1e-6;               // of norms; a composition takes the anchor's
  std::string output_init = "zero";     // zero: the composition starts as the anchor | normal
};

/// Which keys each query sees: the first `visible` of its own sequence's.
struct Visibility {
  std::vector<int64_t> query_offsets;  // [B+1]
  std::vector<int64_t> visible;        // [N_B], not decreasing within a sequence
};

/// Keys and values of a batch: laid end to end, or (from a cache) each sequence's own.
struct KeysValues {
  torch::Tensor k, v;                                           // [N_A, H, k]
  std::vector<int64_t> offsets;                                 // [B+1]
  std::vector<std::pair<torch::Tensor, torch::Tensor>> cached;  // [S_b, H, k] each; used when not empty
};

/// out[n] = sum_{s < c(n)} softmax_s(q_n . k_s / sqrt(k)) v_s; 0 where c(n) = 0. q: [N, H, k]; returns [N, H, k].
/// Differentiable.
torch::Tensor prefix_attention(const torch::Tensor& q, const KeysValues& keys_values, const Visibility& seen);

/// P = H_A W_p + b_p;  Q = H_B W_Q;  K = P W_K;  V = P W_V;  Y = attention(Q, K, V) W_O
///
/// H_A: [S, D_A], a block's output in the augmenting model; H_B: [N, D_B], one in the anchor, to which Y is added. With
/// `rope` the queries and keys are rotated by their places in the anchor's sequence. Parameters are float32 whatever
/// the models are; so is what is computed here.
/// Source: Bansal et al., "LLM Augmented LLMs: Expanding Capabilities through Composition", arXiv 2401.02412.
struct ConnectionImpl : torch::nn::Module {
  /// With uninitialised numbers; device kMeta allocates nothing.
  ConnectionImpl(const ConnectionConfig& config, int64_t augmenting_width, int64_t anchor_width,
                 const torch::TensorOptions& options);

  /// Start values: Normal(0, 1/sqrt(fan_in)), biases 0, W_O as `output_init` says.
  void initialize(at::Generator generator);
  /// states: [S, D_A] -> keys and values [S, H, k], float32, keys rotated by `rope` when the config says so.
  std::pair<torch::Tensor, torch::Tensor> keys_values(const torch::Tensor& states, const nn::RotaryTables& rope);
  /// Y [N, D_B] in h's dtype; rows that see nothing are exactly 0.
  torch::Tensor forward(const torch::Tensor& h, const nn::RotaryTables& rope, const KeysValues& keys_values,
                        const Visibility& seen);
  /// What `forward` gives the values as weights, for people to look at: per sequence [H, T, S] float32, 0 where nothing
  /// is seen.
  std::vector<torch::Tensor> attention_weights(const torch::Tensor& h, const nn::RotaryTables& rope,
                                               const KeysValues& keys_values, const Visibility& seen);

 private:
  torch::Tensor input(const torch::Tensor& x) const;
  torch::Tensor queries(const torch::Tensor& h, const nn::RotaryTables& rope);

  ConnectionConfig config_;
  int64_t heads_, head_dim_;
  nn::Linear proj_{nullptr}, q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, o_proj_{nullptr};
  nn::RmsNorm norm_{nullptr};  // only with norm `post`
};
TORCH_MODULE(Connection);

}  // namespace moesaic::compose
