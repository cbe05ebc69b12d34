#include "moesaic/nn/norm.h"

#include <gtest/gtest.h>

#include "tests/nn/gradcheck.h"

namespace moesaic::nn {
namespace {

using test::expect_gradients_match;
using test::leaf;
using test::relative_error;

torch::Tensor formula(const torch::Tensor& x, const torch::Tensor& weight, double eps, double offset) {
  return x / at::sqrt(x.square().mean(-1, true) + eps) * (weight + offset);
}

TEST(RmsNorm, LiteralRow) {
  // mean(9, 16) = 12.5: [3, 4] / 3.535534 * [1, 2]
  const auto y = rms_norm(torch::tensor({{3.f, 4.f}}), torch::tensor({1.f, 2.f}), 0.0);
  EXPECT_TRUE(at::allclose(y, torch::tensor({{0.8485281f, 2.2627417f}}), 1e-6));
}

TEST(RmsNorm, FusedEqualsFormulaForwardAndBackward) {
  torch::manual_seed(0);
  for (int64_t d : {3, 7, 8, 64, 577}) {
    for (double offset : {0.0, 1.0}) {
      for (bool full : {false, true}) {  // full fine-tuning: the weight has a gradient too
        const auto x = torch::randn({5, d}).requires_grad_(true), w = torch::randn({d}).requires_grad_(full);
        const auto x64 = leaf(x.detach()), w64 = leaf(w.detach()), dy = torch::randn({5, d});
        const auto y = rms_norm(x, w, 1e-5, offset);
        const auto expected = formula(x64, w64, 1e-5, offset);
        EXPECT_LT(relative_error(y, expected), 1e-6) << d;
        y.backward(dy);
        expected.backward(dy.to(torch::kFloat64));
        EXPECT_LT(relative_error(x.grad(), x64.grad()), 2e-5) << d;  // small d: a difference of near-equal terms
        if (full) EXPECT_LT(relative_error(w.grad(), w64.grad()), 2e-6);
        if (!full) EXPECT_FALSE(w.grad().defined());
      }
    }
  }
}

TEST(RmsNorm, WithoutGradientIsTheSame) {
  const auto x = torch::randn({3, 2, 10}), w = torch::randn({10});
  const auto grad = rms_norm(x.clone().requires_grad_(true), w, 1e-6).detach();
  EXPECT_TRUE(torch::equal(rms_norm(x, w, 1e-6), grad));
}

TEST(RmsNorm, NonContiguousHeads) {
  const auto wide = torch::randn({4, 30}), w = torch::randn({5});
  const auto heads = wide.narrow(1, 10, 10).view({4, 2, 5});  // rows 30 apart
  EXPECT_TRUE(torch::equal(rms_norm(heads, w, 1e-6), rms_norm(heads.contiguous(), w, 1e-6)));
}

TEST(RmsNorm, GradientCheckInDouble) {
  expect_gradients_match([](const auto& in) { return rms_norm(in[0], in[1], 1e-5, 1.0); },
                         {leaf(torch::randn({3, 6})), leaf(torch::randn({6}))});
}

/// Against float64 on the same rounded numbers: the gradient is computed in float32 and rounded once, to 2^-9. More
/// rows than are widened at once.
TEST(RmsNorm, Bfloat16GradientIsThatOfTheFormula) {
  torch::manual_seed(3);
  for (const double offset : {0.0, 1.0}) {
    const auto x = torch::randn({700, 48}).to(torch::kBFloat16).requires_grad_(true);
    const auto w = torch::randn({48}).to(torch::kBFloat16), dy = torch::randn({700, 48}).to(torch::kBFloat16);
    const auto x64 = leaf(x.detach());
    const auto y = rms_norm(x, w, 1e-5, offset), expected = formula(x64, w.to(torch::kFloat64), 1e-5, offset);
    EXPECT_TRUE(torch::equal(y, rms_norm(x.detach(), w, 1e-5, offset)));
    EXPECT_LT(relative_error(y, expected), 0.01);  // rounded twice
    y.backward(dy);
    expected.backward(dy.to(torch::kFloat64));
    EXPECT_EQ(x.grad().scalar_type(), torch::kBFloat16);
    EXPECT_LT(relative_error(x.grad(), x64.grad()), 0.003);
  }
}

TEST(RmsNorm, Bfloat16KeepsFloatStatistics) {
  // Squares of 300 values near 100 sum to 3e6; in bfloat16 the sum would stall long before.
  const auto x = torch::full({1, 300}, 100.f).to(torch::kBFloat16);
  const auto y = rms_norm(x, torch::ones({300}, torch::kBFloat16), 0.0);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::equal(y, torch::ones_like(y)));
}

}  // namespace
}  // namespace moesaic::nn
