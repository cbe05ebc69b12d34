#include "moesaic/nn/source.h"

#include <gtest/gtest.h>

namespace moesaic::nn {
namespace {

TEST(SourceCache, RepeatsOfASequenceShareItsKeysAndValues) {
  SourceCache cache(/*layers=*/1, /*batch_size=*/2);
  for (int64_t b : {0, 1}) {
    cache.begin(b, 3);
    cache.put(0, b, torch::ones({3, 2, 4}), torch::zeros({3, 2, 4}));
  }
  const void* keys = cache.at(0, 1).first.data_ptr();
  cache.keep({1, 1, 0, 1});
  EXPECT_EQ(cache.batch_size(), 4);
  for (int64_t b : {0, 1, 3}) {
    EXPECT_TRUE(cache.at(0, b).first.is_same(cache.at(0, 0).first));  // attention goes by this
    EXPECT_TRUE(cache.at(0, b).second.is_same(cache.at(0, 0).second));
    EXPECT_EQ(cache.at(0, b).first.data_ptr(), keys);
  }
  EXPECT_FALSE(cache.at(0, 2).first.is_same(cache.at(0, 0).first));
}

}  // namespace
}  // namespace moesaic::nn
