#include "moesaic/nn/loss.h"

#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::nn {
namespace {

/// The definition, with all logits at once.
torch::Tensor plain_loss(const torch::Tensor& hidden, const torch::Tensor& weight, const torch::Tensor& labels,
                         const torch::Tensor& row_weights, double softcap, double z_loss = 0) {
  auto z = at::matmul(hidden, weight.t());
  if (softcap > 0) z = softcap * (z / softcap).tanh();
  const auto sums = z.logsumexp(1);
  const auto losses = sums - z.gather(1, labels.unsqueeze(1)).squeeze(1) + z_loss * sums.square();
  return (losses * row_weights.to(losses.scalar_type())).sum();
}

struct Problem {
  torch::Tensor hidden, weight, labels, row_weights;
};

Problem random_problem(int64_t rows, int64_t width, int64_t vocabulary, torch::Dtype dtype) {
  torch::manual_seed(7);
  return {torch::randn({rows, width}, dtype), torch::randn({vocabulary, width}, dtype),
          torch::randint(vocabulary, {rows}, torch::kInt64), torch::rand({rows})};
}

double largest_difference(const torch::Tensor& a, const torch::Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(ChunkedCrossEntropy, TwoLogitsByHand) {
  // z = (0, ln 3): softmax = (1/4, 3/4). label 0: loss ln 4; d/dz = (-3/4, 3/4); W = I, so d/dhidden = d/dz.
  auto hidden = torch::tensor({{0.0, std::log(3.0)}}, torch::kFloat64).requires_grad_(true);
  const auto loss = chunked_cross_entropy(hidden, torch::eye(2, torch::kFloat64), torch::tensor({int64_t{0}}),
                                          torch::tensor({2.0}), 0);
  EXPECT_NEAR(loss.item<double>(), 2 * std::log(4.0), 1e-12);
  loss.backward();
  EXPECT_NEAR(hidden.grad()[0][0].item<double>(), -1.5, 1e-12);
  EXPECT_NEAR(hidden.grad()[0][1].item<double>(), 1.5, 1e-12);
}

/// softcap, z_loss
class ChunkedCrossEntropyMatches : public testing::TestWithParam<std::pair<double, double>> {};

TEST_P(ChunkedCrossEntropyMatches, PlainLossAndBothGradients) {
  const auto [softcap, z_loss] = GetParam();
  Problem p = random_problem(37, 5, 11, torch::kFloat64);
  auto h1 = p.hidden.clone().requires_grad_(true), h2 = p.hidden.clone().requires_grad_(true);
  auto w1 = p.weight.clone().requires_grad_(true), w2 = p.weight.clone().requires_grad_(true);
  const auto ours = chunked_cross_entropy(h1, w1, p.labels, p.row_weights, softcap, z_loss);
  const auto plain = plain_loss(h2, w2, p.labels, p.row_weights, softcap, z_loss);
  // A factor on the loss reaches the gradients.
  (3 * ours).backward();
  (3 * plain).backward();
  EXPECT_NEAR(ours.item<double>(), plain.item<double>(), 1e-12);
  EXPECT_LT(largest_difference(h1.grad(), h2.grad()), 1e-12);
  EXPECT_LT(largest_difference(w1.grad(), w2.grad()), 1e-12);
}
INSTANTIATE_TEST_SUITE_P(SoftcapsAndZLosses, ChunkedCrossEntropyMatches,
                         testing::Values(std::pair(0.0, 0.0), std::pair(2.5, 0.0), std::pair(0.0, 0.3),
                                         std::pair(2.5, 0.3)));

TEST(ChunkedCrossEntropy, SeveralChunks) {
  // 64 MiB of float32 logits hold 83 rows of this vocabulary: 170 rows are three chunks, the last one short.
  Problem p = random_problem(170, 16, 200'003, torch::kFloat32);
  auto h1 = p.hidden.clone().requires_grad_(true), h2 = p.hidden.to(torch::kFloat64).requires_grad_(true);
  auto w1 = p.weight.clone().requires_grad_(true), w2 = p.weight.to(torch::kFloat64).requires_grad_(true);
  const auto ours = chunked_cross_entropy(h1, w1, p.labels, p.row_weights, 0);
  const auto plain = plain_loss(h2, w2, p.labels, p.row_weights, 0);
  ours.backward();
  plain.backward();
  EXPECT_NEAR(ours.item<double>(), plain.item<double>(), 1e-6 * plain.item<double>());
  // A gradient row is a float32 product over 200,003 terms: rounding of up to 200,003 * 2^-24 in the worst case.
  EXPECT_LT(largest_difference(h1.grad(), h2.grad()), 1e-3);
  EXPECT_LT(largest_difference(w1.grad(), w2.grad()), 1e-5);
}

TEST(ChunkedCrossEntropy, LabelOfTinyProbabilityStaysFinite) {
  // z = (0, 200): p(label) underflows in float32, the loss is 200 all the same.
  auto hidden = torch::tensor({{0.0f, 200.0f}}).requires_grad_(true);
  const auto loss = chunked_cross_entropy(hidden, torch::eye(2), torch::tensor({int64_t{0}}), torch::ones({1}), 0);
  EXPECT_FLOAT_EQ(loss.item<float>(), 200.0f);
}

TEST(ChunkedCrossEntropy, BFloat16HeadGivesFloat32Loss) {
  Problem p = random_problem(19, 32, 77, torch::kFloat32);
  auto h = p.hidden.to(torch::kBFloat16).requires_grad_(true);
  const auto w = p.weight.to(torch::kBFloat16);
  const auto loss = chunked_cross_entropy(h, w, p.labels, p.row_weights, 0);
  const auto exact = plain_loss(h.detach().to(torch::kFloat32), w.to(torch::kFloat32), p.labels, p.row_weights, 0);
  EXPECT_EQ(loss.scalar_type(), torch::kFloat32);
  // Logits of size ~6 rounded to 8 bits: 6 / 256 each, averaged over the rows.
  EXPECT_NEAR(loss.item<double>(), exact.item<double>(), 0.01 * exact.item<double>());
  loss.backward();
  EXPECT_EQ(h.grad().scalar_type(), torch::kBFloat16);
}

TEST(ChunkedCrossEntropy, NoRowsGiveZero) {
  auto hidden = torch::zeros({0, 4}).requires_grad_(true);
  const auto loss =
      chunked_cross_entropy(hidden, torch::randn({9, 4}), torch::zeros({0}, torch::kInt64), torch::zeros({0}), 0);
  EXPECT_EQ(loss.item<float>(), 0.0f);
}

TEST(ChunkedCrossEntropy, RefusesWrongShapes) {
  EXPECT_THROW(chunked_cross_entropy(torch::zeros({2, 4}), torch::zeros({9, 5}), torch::zeros({2}, torch::kInt64),
                                     torch::zeros({2}), 0),
               ShapeError);
  EXPECT_THROW(chunked_cross_entropy(torch::zeros({2, 4}), torch::zeros({9, 4}), torch::zeros({3}, torch::kInt64),
                                     torch::zeros({2}), 0),
               ShapeError);
}

/// Remembers the largest single allocation while it is installed.
struct LargestAllocation : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    largest = std::max(largest, bytes);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t largest = 0;
};

TEST(ChunkedCrossEntropy, NeverHoldsAllLogits) {
  Problem p = random_problem(1500, 8, 30'000, torch::kFloat32);  // all logits: 180 MB
  p.hidden.requires_grad_(true);
  auto allocations = std::make_shared<LargestAllocation>();
  {
    c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, allocations);
    chunked_cross_entropy(p.hidden, p.weight, p.labels, p.row_weights, 0).backward();
  }
  EXPECT_GT(allocations->largest, 0);
  EXPECT_LE(allocations->largest, cross_entropy_chunk_bytes(torch::kCPU));
}

}  // namespace
}  // namespace moesaic::nn
