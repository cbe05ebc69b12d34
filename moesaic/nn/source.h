// What the cross-attention of a decoder reads: the text of an encoder.
#pragma once
#include <torch/torch.h>

#include <utility>
#include <vector>

namespace moesaic::nn {

/// Keys and values of every layer's cross-attention, per sequence. They never grow, so that repeats of a sequence share
/// them.
class SourceCache {
 public:
  SourceCache(int64_t layers, int64_t batch_size);

  int64_t batch_size() const { return static_cast<int64_t>(lengths_.size()); }
  /// Rows that the encoder read of sequence b; 0 = it has not begun.
  int64_t length(int64_t b) const { return lengths_[b]; }
  /// Sequence b begins with `length` rows, 0: it is forgotten.
  void begin(int64_t b, int64_t length);
  /// Keeps copies of k, v [S, H, k].
  void put(int64_t layer, int64_t b, const torch::Tensor& k, const torch::Tensor& v);
  const std::pair<torch::Tensor, torch::Tensor>& at(int64_t layer, int64_t b) const { return pairs_[layer][b]; }
  /// Keeps the sequences `rows` in that order.
  void keep(const std::vector<int64_t>& rows);
  /// `count` sequences that have not begun join behind the others.
  void add(int64_t count);

 private:
  std::vector<int64_t> lengths_;
  std::vector<std::vector<std::pair<torch::Tensor, torch::Tensor>>> pairs_;  // [layer][b]
};

/// The encoder's final states of the sequences that begin in a pass, and what is kept of all.
struct Source {
  torch::Tensor states;          // [N_s, d]; undefined: none begins
  std::vector<int64_t> offsets;  // [B+1] into the states; sequences that began before have no rows
  torch::Tensor segments;        // [N_s] int64, sequence of each row
  SourceCache* kept = nullptr;   // nullptr: nothing is remembered
};

}  // namespace moesaic::nn
