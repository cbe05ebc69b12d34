#include "moesaic/nn/kv_cache.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::nn {
namespace {

/// `count` rows [count, 1, 2] of the values first, first + 1, ...
torch::Tensor rows(double first, int64_t count) {
  return (torch::arange(count, torch::kFloat32) + first).view({count, 1, 1}).expand({count, 1, 2}).contiguous();
}
std::vector<float> values(const torch::Tensor& keys) {
  const auto flat = keys.select(2, 0).reshape(-1).contiguous();
  return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
}

KvCache cache_of(int64_t batch) { return KvCache(1, 1, 2, batch, torch::TensorOptions(torch::kFloat32)); }

TEST(KvCache, GrowsAndKeepsWhatItHolds) {
  KvCache cache = cache_of(1);
  for (int64_t i = 0; i < 100; ++i) {
    cache.append(0, 0, rows(i, 1), rows(-i, 1));
    cache.commit({1});
  }
  const auto [keys, vals] = cache.append(0, 0, rows(100, 1), rows(-100, 1));
  ASSERT_EQ(keys.size(0), 101);
  for (int64_t i = 0; i <= 100; ++i) {
    EXPECT_EQ(keys[i][0][1].item<float>(), i);
    EXPECT_EQ(vals[i][0][0].item<float>(), -i);
  }
}

TEST(KvCache, AppendIsNotSeenBeforeCommit) {
  KvCache cache = cache_of(1);
  cache.append(0, 0, rows(1, 2), rows(1, 2));
  EXPECT_EQ(cache.length(0), 0);
  cache.commit({2});
  EXPECT_EQ(cache.length(0), 2);
}

TEST(KvCache, TruncateDropsTheTail) {
  KvCache cache = cache_of(1);
  cache.append(0, 0, rows(1, 3), rows(1, 3));
  cache.commit({3});
  cache.truncate(0, 1);
  EXPECT_EQ(values(cache.append(0, 0, rows(9, 1), rows(9, 1)).first), (std::vector<float>{1, 9}));
  EXPECT_THROW(cache.truncate(0, 2), ShapeError);
}

TEST(KvCache, KeepReordersRepeatsAndSharesNothing) {
  KvCache cache = cache_of(2);
  cache.append(0, 0, rows(10, 1), rows(10, 1));
  cache.append(0, 1, rows(20, 2), rows(20, 2));
  cache.commit({1, 2});
  EXPECT_THROW(cache.keep({2}), ShapeError);
  cache.keep({1, 1, 0});
  EXPECT_EQ(cache.batch_size(), 3);
  EXPECT_EQ(values(cache.append(0, 0, rows(5, 1), rows(5, 1)).first), (std::vector<float>{20, 21, 5}));
  EXPECT_EQ(values(cache.append(0, 1, rows(6, 1), rows(6, 1)).first), (std::vector<float>{20, 21, 6}));
  EXPECT_EQ(values(cache.append(0, 2, rows(7, 1), rows(7, 1)).first), (std::vector<float>{10, 7}));
  EXPECT_EQ(values(cache.append(0, 0, rows(5, 1), rows(5, 1)).first), (std::vector<float>{20, 21, 5}));
}

TEST(KvCache, KeptBuffersAreMoved) {
  KvCache cache = cache_of(3);
  for (int64_t b = 0; b < 3; ++b) cache.append(0, b, rows(b, 1), rows(b, 1));
  cache.commit({1, 1, 1});
  const void* buffer = cache.append(0, 2, rows(9, 1), rows(9, 1)).first.data_ptr();
  cache.keep({2, 0});
  EXPECT_EQ(cache.append(0, 0, rows(9, 1), rows(9, 1)).first.data_ptr(), buffer);
}

TEST(KvCache, SequencesJoinEmptyBehindTheOthers) {
  KvCache cache = cache_of(1);
  cache.append(0, 0, rows(1, 2), rows(1, 2));
  cache.commit({2});
  cache.add(2);
  EXPECT_EQ(cache.batch_size(), 3);
  EXPECT_EQ(cache.length(0), 2);
  EXPECT_EQ(cache.length(2), 0);
  EXPECT_EQ(values(cache.append(0, 2, rows(3, 1), rows(3, 1)).first), (std::vector<float>{3}));
}

TEST(KvCache, RepeatsOfAnEmptySequence) {
  KvCache cache = cache_of(1);
  cache.keep({0, 0});
  EXPECT_EQ(values(cache.append(0, 1, rows(3, 1), rows(3, 1)).first), (std::vector<float>{3}));
}

}  // namespace
}  // namespace moesaic::nn
