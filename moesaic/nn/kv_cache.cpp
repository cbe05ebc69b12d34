#include "moesaic/nn/kv_cache.h"

#include "moesaic/base/check.h"

namespace moesaic::nn {
namespace {

constexpr int64_t kFirstCapacity = 64;  // tokens
constexpr int64_t kDoubled = 256;       // tokens up to which buffers double; longer ones grow by a quarter

/// `buffer` with room for `needed` rows, its first `used` rows kept.
torch::Tensor grown(const torch::Tensor& buffer, int64_t used, int64_t needed, int64_t kv_heads, int64_t head_dim,
                    const torch::TensorOptions& options) {
  const int64_t capacity = buffer.defined() ? buffer.size(0) : 0;
  if (needed <= capacity) return buffer;
  const int64_t more = capacity < kDoubled ? 2 * capacity : capacity + capacity / 4;
  torch::Tensor larger = torch::empty({std::max({needed, more, kFirstCapacity}), kv_heads, head_dim}, options);
  if (used > 0) larger.narrow(0, 0, used).copy_(buffer.narrow(0, 0, used));
  return larger;
}

}  // namespace

KvCache::KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t batch_size,
                 const torch::TensorOptions& options)
    : kv_heads_(kv_heads),
      head_dim_(head_dim),
      options_(options.requires_grad(false)),
      lengths_(batch_size, 0),
      keys_(layers, std::vector<torch::Tensor>(batch_size)),
      values_(keys_),
      experts_(layers, std::vector<std::vector<int32_t>>(batch_size)) {}

std::pair<torch::Tensor, torch::Tensor> KvCache::append(int64_t layer, int64_t b, const torch::Tensor& k,
                                                        const torch::Tensor& v) {
  torch::NoGradGuard no_grad;
  const int64_t used = lengths_[b], count = k.size(0);
  MOESAIC_ASSERT(k.sizes() == v.sizes() && k.dim() == 3 && k.size(1) == kv_heads_ && k.size(2) == head_dim_);
  torch::Tensor& keys = keys_[layer][b];
  torch::Tensor& values = values_[layer][b];
  keys = grown(keys, used, used + count, kv_heads_, head_dim_, options_);
  values = grown(values, used, used + count, kv_heads_, head_dim_, options_);
  keys.narrow(0, used, count).copy_(k);
  values.narrow(0, used, count).copy_(v);
  return {keys.narrow(0, 0, used + count), values.narrow(0, 0, used + count)};
}

void KvCache::commit(const std::vector<int64_t>& counts) {
  MOESAIC_CHECK(counts.size() == lengths_.size(), ShapeError, "KV cache: got {} sequences, expected {}", counts.size(),
                lengths_.size());
  for (size_t b = 0; b < counts.size(); ++b) {
    lengths_[b] += counts[b];
    MOESAIC_ASSERT(std::all_of(keys_.begin(), keys_.end(), [&](const std::vector<torch::Tensor>& layer) {
      return lengths_[b] == 0 || (layer[b].defined() && layer[b].size(0) >= lengths_[b]);
    }));
  }
}

void KvCache::truncate(int64_t b, int64_t length) {
  MOESAIC_CHECK(length >= 0 && length <= lengths_.at(b), ShapeError,
                "KV cache: cannot cut sequence {} of {} tokens to {}", b, lengths_.at(b), length);
  lengths_[b] = length;
}

void KvCache::keep(const std::vector<int64_t>& rows) {
  std::vector<int64_t> lengths;
  for (const int64_t b : rows) {
    MOESAIC_CHECK(b >= 0 && b < batch_size(), ShapeError, "KV cache: got row {}, expected 0 to {}", b,
                  batch_size() - 1);
    lengths.push_back(lengths_[b]);
  }
  for (auto* all : {&keys_, &values_}) {
    for (std::vector<torch::Tensor>& layer : *all) {
      std::vector<torch::Tensor> kept;
      std::vector<uint8_t> taken(layer.size(), 0);
      for (const int64_t b : rows) {
        const bool copy = taken[b] != 0 && lengths_[b] > 0;
        kept.push_back(copy ? layer[b].clone() : taken[b] != 0 ? torch::Tensor() : layer[b]);
        taken[b] = 1;
      }
      layer = std::move(kept);
    }
  }
  for (auto& layer : experts_) {
    std::vector<std::vector<int32_t>> kept;
    for (const int64_t b : rows) kept.push_back(layer[b]);
    layer = std::move(kept);
  }
  lengths_ = std::move(lengths);
}

KvCache KvCache::clone() const {
  KvCache other = *this;
  for (auto* all : {&other.keys_, &other.values_}) {
    for (std::vector<torch::Tensor>& layer : *all) {
      for (torch::Tensor& rows : layer) {
        if (rows.defined()) rows = rows.clone();
      }
    }
  }
  return other;
}

int64_t KvCache::token_bytes() const {
  const int64_t numbers = 2 * std::ssize(keys_) * kv_heads_ * head_dim_;
  return numbers * static_cast<int64_t>(c10::elementSize(c10::typeMetaToScalarType(options_.dtype())));
}

void KvCache::add(int64_t count) {
  lengths_.resize(lengths_.size() + count, 0);
  for (auto* all : {&keys_, &values_}) {
    for (std::vector<torch::Tensor>& layer : *all) layer.resize(lengths_.size());
  }
  for (auto& layer : experts_) layer.resize(lengths_.size());
}

std::vector<int32_t>& KvCache::experts(int64_t layer, int64_t b) {
  std::vector<int32_t>& of_tokens = experts_[layer][b];
  if (std::ssize(of_tokens) > lengths_[b]) of_tokens.resize(lengths_[b]);
  return of_tokens;
}

}  // namespace moesaic::nn
