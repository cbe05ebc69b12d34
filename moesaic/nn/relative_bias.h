// Relative positions as a learnt number per head that is added to the scores of attention.
#pragma once
#include <torch/torch.h>

namespace moesaic::nn {

/// b[h, i, j] = weight[bucket(j - i), h]: what head h adds to the score of query i and key j.
///
/// Half of the buckets are exact distances, the others grow logarithmically up to max_distance, and the last one holds
/// all beyond. With `both_ways` (an encoder) keys behind and ahead have half of the buckets each; without it (a
/// decoder) all are for keys behind, and what lies ahead is -inf.
/// Source: Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1.
struct RelativeBiasImpl : torch::nn::Module {
  RelativeBiasImpl(int64_t buckets, int64_t max_distance, int64_t heads, bool both_ways,
                   const torch::TensorOptions& options);

  /// [H, S, T] for queries that are the last S of T positions. Of a frozen weight it is computed once for the longest
  /// text so far, and shorter ones are views of it; of a trained one anew, with its graph.
  torch::Tensor forward(int64_t queries, int64_t keys);
  /// bucket(relative) of int64 distances j - i.
  torch::Tensor bucket(const torch::Tensor& relative) const;

  torch::Tensor weight;  // [buckets, H]

 private:
  torch::Tensor all(int64_t length) const;

  int64_t max_distance_;
  bool both_ways_;
  torch::Tensor kept_;  // [H, L, L] of `weight` as it was in its version `kept_version_`
  uint32_t kept_version_ = 0;
};
TORCH_MODULE(RelativeBias);

}  // namespace moesaic::nn
