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
  std::string cross_position = "rope";  // rope | recency | none (the paper)
  std::string norm = "pre";             // pre | standard | none (paper) | post (released); see Connection
  double output_scale = 0.0;            // Y in units of so much of its row of H_B; 0 = as it is (paper)
  bool attention_bias = false;          // biases at q, k, v, o (the released code)
  double norm_eps = 1e-6;               // of norms; a composition takes the anchor's
  std::string output_init = "zero";     // zero: the composition starts as the anchor | normal
};

/// Which keys each query sees: the first `visible` of its own sequence's, and those of `aside`; and where both are.
struct Visibility {
  std::vector<int64_t> query_offsets;  // [B+1]
  std::vector<int64_t> visible;        // [N_B], not decreasing within a sequence
  // Places in the anchor's sequence, for who weighs by distance:
  std::vector<int64_t> query_places{};             // [N_B]
  std::vector<std::vector<int64_t>> key_places{};  // per sequence, of all keys
  /// [N_B]: of the query's sequence the keys begin .. end-1 that it sees, too, behind all that any other sees. Empty =
  /// none of any query.
  std::vector<std::pair<int64_t, int64_t>> aside{};
};

/// Keys and values of a batch: laid end to end, or (from a cache) each sequence's own.
struct KeysValues {
  torch::Tensor k, v;                                           // [N_A, H, k]
  std::vector<int64_t> offsets;                                 // [B+1]
  std::vector<std::pair<torch::Tensor, torch::Tensor>> cached;  // [S_b, H, k] each; used when not empty
};

/// out[n] = sum_s softmax_s(q_n . k_s / sqrt(k) - slope |place_n - place_s|) v_s over the s that n sees; 0 where it
/// sees none. q: [N, H, k]; slopes: [H], undefined = 0; returns [N, H, k]. Differentiable.
torch::Tensor prefix_attention(const torch::Tensor& q, const KeysValues& keys_values, const Visibility& seen,
                               const torch::Tensor& slopes = {});

/// P = H_A W_p + b_p;  Q = H_B W_Q;  K = P W_K;  V = P W_V;  Y = attention(Q, K, V) W_O
/// or, of one that reads the newest state alone, Y[n] = P[s], s being the last that n sees
///
/// H_A: [S, D_A], a block's output in the augmenting model; H_B: [N, D_B], one in the anchor, to which Y is added.
///
/// cross_position: `rope` rotates queries and keys by their places in the anchor's sequence; `recency` takes from each
/// head's scores its slope, learned, times the places between both: Press et al., arXiv 2108.12409, where they are
/// fixed. norm: `pre` divides rows of H_A and H_B by their root mean square; `standard` does so with H_B, and takes
/// from each dimension of H_A its mean and divides it by its deviation, those of the first batch that is trained;
/// `post` is RMSNorm on Y. output_scale, where it is not 0, multiplies Y, together with the root mean square of its row
/// of H_B.
///
/// Parameters are float32 whatever the models are; so is what is computed here.
/// Source: Bansal et al., "LLM Augmented LLMs: Expanding Capabilities through Composition", arXiv 2401.02412.
struct ConnectionImpl : torch::nn::Module {
  /// With uninitialised numbers; device kMeta allocates nothing.
  ConnectionImpl(const ConnectionConfig& config, bool newest, int64_t augmenting_width, int64_t anchor_width,
                 const torch::TensorOptions& options);

  /// Start values: Normal(0, 1/sqrt(fan_in)), biases 0, the last matrix as `output_init` says.
  void initialize(at::Generator generator);
  /// states: [S, D_A] -> keys and values [S, H, k], float32, keys rotated by `rope` when the config says so. Of one
  /// that reads the newest state alone both are P.
  std::pair<torch::Tensor, torch::Tensor> keys_values(const torch::Tensor& states, const nn::RotaryTables& rope);
  /// Y [N, D_B] in h's dtype; rows that see nothing are exactly 0.
  torch::Tensor forward(const torch::Tensor& h, const nn::RotaryTables& rope, const KeysValues& keys_values,
                        const Visibility& seen);
  /// What `forward` gives the values as weights, for people to look at: per sequence [H, T, S] float32, 0 where nothing
  /// is seen.
  std::vector<torch::Tensor> attention_weights(const torch::Tensor& h, const nn::RotaryTables& rope,
                                               const KeysValues& keys_values, const Visibility& seen);

 private:
  torch::Tensor unit_rows(const torch::Tensor& x) const;
  torch::Tensor augmenting_input(const torch::Tensor& states);
  torch::Tensor queries(const torch::Tensor& h, const nn::RotaryTables& rope);

  ConnectionConfig config_;
  bool newest_;
  int64_t heads_, head_dim_;
  nn::Linear proj_{nullptr}, q_proj_{nullptr}, k_proj_{nullptr}, v_proj_{nullptr}, o_proj_{nullptr};
  nn::RmsNorm norm_{nullptr};       // only with norm `post`
  torch::Tensor slopes_;            // [H], only with `recency`
  torch::Tensor mean_, deviation_;  // [D_A], only with norm `standard`; 0 and 1 until they are known
};
TORCH_MODULE(Connection);

}  // namespace moesaic::compose
