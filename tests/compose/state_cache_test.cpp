#include "moesaic/compose/state_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/temporary_folder.h"

namespace moesaic::compose {
namespace {

std::vector<torch::Tensor> states(float first) { return {torch::full({3, 4}, first), torch::full({3, 2}, first + 1)}; }
constexpr int64_t kBytes = (3 * 4 + 3 * 2) * 4;  // of states()

TEST(StateCacheKey, DependsOnEverything) {
  const std::string key = StateCache::key("model", {1, 3}, {5, 6});
  EXPECT_EQ(key, StateCache::key("model", {1, 3}, {5, 6}));
  for (const auto& other : {StateCache::key("model2", {1, 3}, {5, 6}), StateCache::key("model", {1}, {3, 5, 6}),
                            StateCache::key("model", {1, 3}, {5, 6, 0}), StateCache::key("model", {1, 3}, {6, 5})}) {
    EXPECT_NE(key, other);
  }
}

TEST(StateCache, KeepsCopies) {
  StateCache cache(1 << 20);
  EXPECT_FALSE(cache.find("a"));
  auto given = states(1);
  cache.add("a", given);
  given[0].zero_();
  const auto found = cache.find("a");
  ASSERT_TRUE(found);
  EXPECT_TRUE(torch::equal((*found)[0], torch::full({3, 4}, 1.f)));
  EXPECT_TRUE(torch::equal((*found)[1], torch::full({3, 2}, 2.f)));
  EXPECT_EQ(cache.hits(), 1);
  EXPECT_EQ(cache.misses(), 1);
  EXPECT_EQ(cache.bytes(), kBytes);
}

TEST(StateCache, WhatDoesNotFitIsNotKeptAndDrivesNothingOut) {
  StateCache cache(2 * kBytes);
  for (const char* key : {"a", "b", "c", "a"}) cache.add(key, states(1));
  EXPECT_TRUE(cache.find("a"));
  EXPECT_TRUE(cache.find("b"));
  EXPECT_FALSE(cache.find("c"));
  EXPECT_EQ(cache.bytes(), 2 * kBytes);
}

TEST(StateCache, FilesOutliveIt) {
  const test::TemporaryFolder folder;
  const auto dir = folder.path() / "states";
  int64_t bytes = 0;
  {
    StateCache cache(1 << 20, dir);
    cache.add("a", states(7));
    bytes = cache.bytes();
  }
  StateCache cache(bytes, dir);
  EXPECT_EQ(cache.bytes(), bytes);
  cache.add("b", states(8));  // the limit counts what was there before
  EXPECT_FALSE(cache.find("b"));
  const auto found = cache.find("a");
  ASSERT_TRUE(found);
  EXPECT_TRUE(torch::equal((*found)[0], torch::full({3, 4}, 7.f)));
  EXPECT_TRUE(torch::equal((*found)[1], torch::full({3, 2}, 8.f)));
}

TEST(StateCache, ADamagedFileIsComputedAgain) {
  const test::TemporaryFolder folder;
  StateCache cache(1 << 20, folder.path());
  cache.add("a", states(7));
  std::ofstream(folder.path() / "a.safetensors") << "no tensors";
  EXPECT_FALSE(cache.find("a"));
  EXPECT_EQ(cache.bytes(), 0);
  cache.add("a", states(7));
  EXPECT_TRUE(cache.find("a"));
}

TEST(StateCache, AFileInTheFoldersPlaceIsSaid) {
  const test::TemporaryFolder folder;
  std::ofstream(folder.path() / "states") << "x";
  EXPECT_THROW(StateCache(1, folder.path() / "states"), DataError);
}

}  // namespace
}  // namespace moesaic::compose
