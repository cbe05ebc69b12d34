#include "moesaic/nn/source.h"

#include "moesaic/base/check.h"

namespace moesaic::nn {

SourceCache::SourceCache(int64_t layers, int64_t batch_size)
    : lengths_(batch_size, 0), pairs_(layers, std::vector<std::pair<torch::Tensor, torch::Tensor>>(batch_size)) {}

void SourceCache::begin(int64_t b, int64_t length) {
  lengths_.at(b) = length;
  for (auto& layer : pairs_) layer[b] = {};
}

void SourceCache::put(int64_t layer, int64_t b, const torch::Tensor& k, const torch::Tensor& v) {
  MOESAIC_ASSERT(k.sizes() == v.sizes() && k.size(0) == lengths_[b]);
  pairs_[layer][b] = {k.clone(torch::MemoryFormat::Contiguous), v.clone(torch::MemoryFormat::Contiguous)};
}

void SourceCache::keep(const std::vector<int64_t>& rows) {
  auto chosen = [&](const auto& all) {
    std::decay_t<decltype(all)> kept;
    for (const int64_t b : rows) kept.push_back(all.at(b));
    return kept;
  };
  lengths_ = chosen(lengths_);
  for (auto& layer : pairs_) layer = chosen(layer);
}

void SourceCache::add(int64_t count) {
  lengths_.resize(lengths_.size() + count, 0);
  for (auto& layer : pairs_) layer.resize(lengths_.size());
}

}  // namespace moesaic::nn
