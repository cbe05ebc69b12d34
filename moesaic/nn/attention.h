// Attention over ragged batches: of a text to itself, with and without a cache, and of one text to another.
#pragma once
#include <torch/torch.h>

#include <string>
#include <vector>

#include "moesaic/nn/linear.h"
#include "moesaic/nn/norm.h"
#include "moesaic/nn/relative_bias.h"

namespace moesaic::nn {

/// What the scores go through.
struct AttentionOptions {
  double scale = 1.0;          // of the scores, e.g. 1/sqrt(k)
  double softcap = 0.0;        // scores = softcap tanh(scores / softcap); 0 = off
  int64_t window = 0;          // a position sees itself and the window-1 positions before it; 0 = all before it
  bool causal = true;          // false: a position sees its whole sequence, or up to `window` positions before it
  int64_t behind = -1;         // not causal: how many positions behind it with a window; -1 = as many
  int64_t always = 0;          // the first positions of the keys, which all see whatever the window
  RelativeBias bias{nullptr};  // added to the scores; it hides what lies ahead itself where it is a decoder's
};

/// out[n] = sum_j softmax_j(scale q_n . k_j + bias) v_j over the positions j <= n of n's own sequence, or all of it.
/// q: [N, H, k]; k, v: [N, H_kv, k], H a multiple of H_kv (consecutive query heads share a KV head); returns [N, H, k].
/// Never makes an [S, S] matrix of scores unless softcap is on or a bias is learnt, and none of flags unless a sequence
/// is longer than the window.
torch::Tensor ragged_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const std::vector<int64_t>& offsets, const AttentionOptions& options);
/// The same with sequences of keys and values of their own, k, v: [N_k, H_kv, k]; causal: the queries are the last
/// positions of these. Not for `always`.
torch::Tensor ragged_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets,
                               const AttentionOptions& options);

/// The same with `pass.cache`: appends k and v behind the cached rows of `layer` and attends to all of them. A
/// sequence may have no new row. No gradient.
torch::Tensor cached_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, int64_t layer,
                               const Pass& pass, const AttentionOptions& options);

/// The checkpoint's names of an attention's linears.
struct AttentionNames {
  const char *q = "q_proj", *k = "k_proj", *v = "v_proj", *o = "o_proj";
};

/// Sizes and switches of an attention.
struct SelfAttentionConfig {
  AttentionNames names{};
  int64_t hidden_size = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int64_t source_size = 0;                // width of what a cross-attention reads; 0 = hidden_size
  bool qkv_bias = false, o_bias = false;  // which linears add a bias
  bool qk_norm = false;                   // RMSNorm on queries and keys, before RoPE: of each head
  bool flat_qk_norm = false;              // of all heads as one
  double clip = 0.0;                      // queries, keys and values are kept within +-clip, behind the norms; 0 = off
  double norm_eps = 1e-6, norm_offset = 0.0;
  AttentionOptions options;  // scale, soft cap, window and bias
  bool rotary = true;        // queries and keys rotate, by pass.rope
  bool local_rope = false;   // by pass.rope_local
  bool owns_bias = false;    // the relative bias is a parameter of this attention
  int64_t cache_layer = -1;  // its place in the cache; -1 = its layer
};

/// q, k, v = x Wqkv; q, k = rope(norm(q)), rope(norm(k)); out = attention(q, k, v) Wo.
struct SelfAttentionImpl : torch::nn::Module {
  SelfAttentionImpl(const SelfAttentionConfig& config, int64_t layer, const torch::TensorOptions& options);

  /// x: [N, d] -> [N, d].
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  /// Appends the sites; `path` is the module path, "model.layers.0.self_attn".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8();
  /// Numbers per row that the backward pass needs, adapters apart. whole: the weights are trained themselves.
  int64_t saved_per_row(bool whole) const;

 private:
  SelfAttentionConfig config_;
  int64_t layer_;
  LinearGroup qkv_, o_;
  RmsNorm q_norm_{nullptr}, k_norm_{nullptr};
  ScaleSlot q_normed_slot_, k_normed_slot_;  // after the per-head norm
};
TORCH_MODULE(SelfAttention);

/// One softmax over a text and its source (T5Gemma 2): q = rope(norm(x Wq)); k, v = [s Wkv; x Wkv] over the encoder's
/// states s of pass.source, keys normed and those of x rotated; out = attention(q, k, v) Wo. Every row sees the whole
/// source of its sequence, and of its own text what causality and window let it.
struct MergedAttentionImpl : torch::nn::Module {
  MergedAttentionImpl(const SelfAttentionConfig& config, int64_t layer, const torch::TensorOptions& options);

  /// x: [N, d] -> [N, d].
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  /// Appends the sites; `path` is the module path, "model.decoder.layers.0.self_attn".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8();
  int64_t saved_per_row(bool whole) const;

 private:
  std::pair<torch::Tensor, torch::Tensor> keys_values(const torch::Tensor& x, Pass& pass);

  SelfAttentionConfig config_;
  int64_t layer_;
  LinearGroup q_, kv_, o_;
  RmsNorm q_norm_{nullptr}, k_norm_{nullptr};
  ScaleSlot q_normed_slot_, k_normed_slot_;
};
TORCH_MODULE(MergedAttention);

/// q = x Wq; k, v = s Wkv over the encoder's states s of pass.source; out = attention(q, k, v) Wo. Every row sees the
/// whole source of its sequence. Keys and values of a source are made once where the pass remembers.
struct CrossAttentionImpl : torch::nn::Module {
  CrossAttentionImpl(const SelfAttentionConfig& config, int64_t layer, const torch::TensorOptions& options);

  /// x: [N, d] -> [N, d].
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  /// Appends the sites; `path` is the module path, "decoder.block.0.layer.1.EncDecAttention".
  void add_sites(const std::string& path, Sites& sites);
  void quantize_int8();
  int64_t saved_per_row(bool whole) const;

 private:
  SelfAttentionConfig config_;
  int64_t layer_;
  LinearGroup q_, kv_, o_;
};
TORCH_MODULE(CrossAttention);

}  // namespace moesaic::nn
