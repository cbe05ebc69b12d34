// Keys and values of the tokens seen so far, one buffer per layer and sequence; of layers whose experts have room for
// so many tokens of a text also which expert each had.
#pragma once
#include <torch/torch.h>

#include <utility>
#include <vector>

namespace moesaic::nn {

/// Grows by doubling, later by a quarter; sequences have their own lengths, and join and leave. Scaled keys and values
/// are stored (a token is scaled once).
class KvCache {
 public:
  KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t batch_size, const torch::TensorOptions& options);

  int64_t batch_size() const { return static_cast<int64_t>(lengths_.size()); }
  /// Tokens of sequence b that every layer holds (advanced by `commit`).
  int64_t length(int64_t b) const { return lengths_[b]; }
  /// Stores rows k, v [S, H_kv, k] behind sequence b's tokens at `layer`; returns views of all its keys and values,
  /// [length + S, H_kv, k] each.
  std::pair<torch::Tensor, torch::Tensor> append(int64_t layer, int64_t b, const torch::Tensor& k,
                                                 const torch::Tensor& v);
  /// Called once per forward pass, after the last layer: sequence b grew by counts[b].
  void commit(const std::vector<int64_t>& counts);
  /// Drops everything of sequence b behind its first `length` tokens.
  void truncate(int64_t b, int64_t length);
  /// Keeps the sequences `rows` in that order. Their buffers are moved; only the repeats of one are copied.
  void keep(const std::vector<int64_t>& rows);
  /// One with numbers of its own.
  KvCache clone() const;
  /// `count` empty sequences join behind the others.
  void add(int64_t count);
  /// Bytes of one token in all layers.
  int64_t token_bytes() const;
  /// The expert that each of sequence b's tokens was routed to at `layer`, to be continued by whoever routes. Those of
  /// tokens that were dropped are gone.
  std::vector<int32_t>& experts(int64_t layer, int64_t b);

 private:
  int64_t kv_heads_, head_dim_;
  torch::TensorOptions options_;
  std::vector<int64_t> lengths_;
  std::vector<std::vector<torch::Tensor>> keys_, values_;   // [layer][b]: [capacity, H_kv, k]
  std::vector<std::vector<std::vector<int32_t>>> experts_;  // [layer][b]
};

}  // namespace moesaic::nn
