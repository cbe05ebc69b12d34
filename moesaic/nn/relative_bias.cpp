#include "moesaic/nn/relative_bias.h"

#include <bit>

namespace moesaic::nn {

RelativeBiasImpl::RelativeBiasImpl(int64_t buckets, int64_t max_distance, int64_t heads, bool both_ways,
                                   const torch::TensorOptions& options)
    : max_distance_(max_distance), both_ways_(both_ways) {
  weight = register_parameter("weight", torch::empty({buckets, heads}, options), /*requires_grad=*/false);
}

torch::Tensor RelativeBiasImpl::bucket(const torch::Tensor& relative) const {
  const int64_t buckets = both_ways_ ? weight.size(0) / 2 : weight.size(0), exact = buckets / 2;
  const torch::Tensor distance = both_ways_ ? relative.abs() : (-relative).clamp_min(0);
  // In float32 and in this order, as transformers rounds.
  const torch::Tensor grown = (distance.to(torch::kFloat32) / static_cast<double>(exact)).log() /
                              std::log(static_cast<double>(max_distance_) / static_cast<double>(exact)) *
                              static_cast<double>(buckets - exact);
  const torch::Tensor far = (grown.clamp_min(0).to(torch::kInt64) + exact).clamp_max(buckets - 1);
  const torch::Tensor near_or_far = at::where(distance < exact, distance, far);
  return both_ways_ ? near_or_far + (relative > 0).to(torch::kInt64) * buckets : near_or_far;
}

/// [H, L, L].
torch::Tensor RelativeBiasImpl::all(int64_t length) const {
  const torch::Tensor position = torch::arange(length, torch::kInt64);
  const torch::Tensor relative = position - position.unsqueeze(1);  // [L, L], j - i
  const torch::Tensor index = bucket(relative).flatten().to(weight.device());
  const torch::Tensor bias = weight.index_select(0, index).t().reshape({-1, length, length});
  if (both_ways_) return bias;
  return bias.masked_fill((relative > 0).to(weight.device()), -std::numeric_limits<double>::infinity());
}

torch::Tensor RelativeBiasImpl::forward(int64_t queries, int64_t keys) {
  if (weight.requires_grad()) return all(keys).slice(1, keys - queries);
  if (!kept_.defined() || kept_.size(1) < keys || kept_version_ != weight._version()) {
    kept_ = all(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(keys, 32)))));
    kept_version_ = weight._version();
  }
  return kept_.slice(1, keys - queries, keys).slice(2, 0, keys);
}

}  // namespace moesaic::nn
