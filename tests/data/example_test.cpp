#include "moesaic/data/example.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;

std::vector<int64_t> values(const torch::Tensor& tensor) {
  torch::Tensor flat = tensor.contiguous();
  return {flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel()};
}

TEST(Example, TheFirstTokenIsNeverATarget) {
  EXPECT_EQ((Example{{5, 6, 7}, {1, 0, 1}, {}, 0}).targets(), 1);
  EXPECT_EQ(Example{}.targets(), 0);
}

TEST(Collate, LabelsAreTheNextTokensOfMarkedPositions) {
  // Sequence 0 is rows 0..3, sequence 1 is rows 4..5. Row i predicts token i + 1 of its own sequence only: the marked
  // first token of sequence 1 gives no label to the last row of sequence 0.
  Batch batch = collate({{{10, 11, 12, 13}, {0, 0, 1, 1}, {}, 3}, {{20, 21}, {1, 1}, {}, 0}}, torch::kCPU);
  EXPECT_THAT(values(batch.tokens.tokens), ElementsAre(10, 11, 12, 13, 20, 21));
  EXPECT_THAT(batch.tokens.offsets, ElementsAre(0, 4, 6));
  EXPECT_THAT(values(batch.label_rows), ElementsAre(1, 2, 4));
  EXPECT_THAT(values(batch.labels), ElementsAre(12, 13, 21));
  EXPECT_THAT(values(batch.label_sequences), ElementsAre(0, 0, 1));
  EXPECT_THAT(batch.datasets, ElementsAre(3, 0));
  EXPECT_EQ(batch.num_targets(), 3);
  EXPECT_FALSE(batch.sentence.defined());
}

TEST(Collate, StacksSentenceEmbeddings) {
  Batch batch = collate({{{1, 2}, {0, 1}, {0.5f, 1.f}, 0}, {{3, 4}, {0, 1}, {2.f, 3.f}, 0}}, torch::kCPU);
  EXPECT_TRUE(torch::equal(batch.sentence, torch::tensor({{0.5f, 1.f}, {2.f, 3.f}})));
  EXPECT_THROW(collate({{{1, 2}, {0, 1}, {0.5f}, 0}, {{3, 4}, {0, 1}, {}, 0}}, torch::kCPU), DataError);
}

TEST(Collate, RefusesAnEmptyExample) {
  EXPECT_THROW(collate({{{}, {}, {}, 0}}, torch::kCPU), ShapeError);
  EXPECT_THROW(collate({{{1, 2}, {0}, {}, 0}}, torch::kCPU), ShapeError);
}

}  // namespace
}  // namespace moesaic::data
