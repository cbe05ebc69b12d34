#include "moesaic/nn/pass.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::nn {
namespace {

TEST(RaggedBatch, LaysSequencesEndToEnd) {
  const auto batch = RaggedBatch::from_sequences({{5, 6, 7}, {8}});
  EXPECT_TRUE(torch::equal(batch.tokens, torch::tensor({5, 6, 7, 8}, torch::kInt64)));
  EXPECT_EQ(batch.offsets, (std::vector<int64_t>{0, 3, 4}));
  EXPECT_EQ(batch.batch_size(), 2);
  EXPECT_EQ(batch.num_tokens(), 4);
}

TEST(RaggedBatch, RefusesEmptySequences) {
  EXPECT_THROW(RaggedBatch::from_sequences({{1}, {}}), ShapeError);
  EXPECT_THROW(RaggedBatch::from_sequences({}), ShapeError);
}

}  // namespace
}  // namespace moesaic::nn
