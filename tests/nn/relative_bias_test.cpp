#include "moesaic/nn/relative_bias.h"

#include <gtest/gtest.h>

namespace moesaic::nn {
namespace {

RelativeBias counting_bias(int64_t buckets, int64_t max_distance, bool both_ways) {
  RelativeBias bias(buckets, max_distance, 2, both_ways, torch::TensorOptions(torch::kFloat32));
  // Head 0 adds the number of the bucket, head 1 its negative.
  const auto number = torch::arange(buckets, torch::kFloat32);
  bias->weight.copy_(torch::stack({number, -number}, 1));
  return bias;
}

std::vector<int64_t> buckets_of(const RelativeBias& bias, const std::vector<int64_t>& relative) {
  const auto found = bias->bucket(torch::tensor(relative));
  return {found.data_ptr<int64_t>(), found.data_ptr<int64_t>() + found.numel()};
}

TEST(RelativeBias, BucketsOfADecoder) {
  // 8 buckets up to distance 32: 0 to 3 are exact, then 4 + floor(4 log(distance / 4) / log(32 / 4)), at most 7:
  // 6: 4 + 0.78, 7: 4 + 1.08, 11: 4 + 1.95, 12: 4 + 2.11, 19: 4 + 2.997, 20: 4 + 3.10. What lies ahead is bucket 0.
  const auto bias = counting_bias(8, 32, false);
  EXPECT_EQ(buckets_of(bias, {0, -1, -3, -4, -6, -7, -11, -12, -19, -20, -31, -32, -1000, 5}),
            (std::vector<int64_t>{0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 0}));
}

TEST(RelativeBias, BucketsOfAnEncoder) {
  // 4 buckets each way: 0 and 1 are exact, then 2 + floor(2 log(distance / 2) / log(8 / 2)), at most 3; ahead 4 more.
  const auto bias = counting_bias(8, 8, true);
  EXPECT_EQ(buckets_of(bias, {0, -1, -2, -3, -4, -100, 1, 2, 3, 4, 100}),
            (std::vector<int64_t>{0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7}));
}

TEST(RelativeBias, ADecoderDoesNotSeeAhead) {
  const float hidden = -std::numeric_limits<float>::infinity();
  auto bias = counting_bias(8, 32, false);
  EXPECT_TRUE(torch::equal(bias->forward(3, 3)[0],
                           torch::tensor({{0.f, hidden, hidden}, {1.f, 0.f, hidden}, {2.f, 1.f, 0.f}})));
  // The last two of three positions.
  EXPECT_TRUE(torch::equal(bias->forward(2, 3)[1], torch::tensor({{-1.f, 0.f, hidden}, {-2.f, -1.f, 0.f}})));
}

TEST(RelativeBias, KeptUntilTheWeightChanges) {
  auto bias = counting_bias(8, 32, true);
  const auto first = bias->forward(5, 5);
  EXPECT_EQ(bias->forward(5, 5).data_ptr(), first.data_ptr());
  EXPECT_EQ(bias->forward(4, 4).data_ptr(), first.data_ptr());  // the same distances
  EXPECT_TRUE(torch::equal(bias->forward(100, 100).slice(1, 0, 5).slice(2, 0, 5), first));
  bias->weight.add_(1);
  EXPECT_TRUE(torch::equal(bias->forward(5, 5)[0], first[0] + 1));
}

TEST(RelativeBias, ATrainedWeightHasAGradient) {
  auto bias = counting_bias(8, 32, true);
  bias->weight.requires_grad_(true);
  bias->forward(3, 3).sum().backward();
  // Distance 0 three times, -1 and 1 twice, -2 and 2 (buckets 2 and 4 + 2) once, for both heads.
  EXPECT_TRUE(torch::equal(bias->weight.grad().select(1, 0), torch::tensor({3.f, 2.f, 1.f, 0.f, 0.f, 2.f, 1.f, 0.f})));
}

}  // namespace
}  // namespace moesaic::nn
