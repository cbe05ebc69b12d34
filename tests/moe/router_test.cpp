#include "moesaic/moe/router.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::moe {
namespace {

TEST(TopkWeights, MaskKeepsTheLargestWithoutRenormalising) {
  const auto probs = torch::tensor({{0.5, 0.3, 0.2}, {0.1, 0.2, 0.7}});
  const auto expected = torch::tensor({{0.5, 0.3, 0.0}, {0.0, 0.2, 0.7}});
  EXPECT_TRUE(topk_weights(probs, 2, TopkMode::kMask).equal(expected));
}

TEST(TopkWeights, RenormDividesByTheKeptMass) {
  const auto probs = torch::tensor({{0.5, 0.3, 0.2}});
  const auto expected = torch::tensor({{0.625, 0.375, 0.0}});  // / 0.8
  EXPECT_TRUE(topk_weights(probs, 2, TopkMode::kRenorm).allclose(expected, 1e-6, 1e-7));
}

TEST(TopkWeights, AllExpertsEqualSoftMerging) {
  const auto probs = torch::rand({7, 5}).softmax(-1);
  for (TopkMode mode : {TopkMode::kMask, TopkMode::kRenorm, TopkMode::kResidual}) {
    EXPECT_TRUE(topk_weights(probs, 5, mode).equal(probs));
    EXPECT_TRUE(topk_weights(probs, 0, mode).equal(probs));
  }
}

TEST(TopkWeights, TopOneStillGivesTheRouterAGradient) {
  auto logits = torch::tensor({{1.0, 0.0, -1.0}}, torch::requires_grad());
  topk_weights(logits.softmax(-1), 1, TopkMode::kMask).sum().backward();
  EXPECT_GT(logits.grad().abs().sum().item<double>(), 0.1);
}

nn::RoutingRecord record(torch::Tensor probs, torch::Tensor weights) {
  return {"owner", "site", 0, true, probs.log(), probs, weights, 1};
}

TEST(BalanceLoss, ClosedFormOnThreeTokens) {
  // top-1 of the tokens: expert 0, 0, 1 -> f = (2/3, 1/3, 0); P = mean prob = (0.5, 0.3, 0.2).
  const auto probs = torch::tensor({{0.6, 0.3, 0.1}, {0.7, 0.1, 0.2}, {0.2, 0.5, 0.3}});
  const double expected = 3 * (2.0 / 3 * 0.5 + 1.0 / 3 * 0.3);
  const auto top1 = topk_weights(probs, 1, TopkMode::kMask);
  EXPECT_NEAR(balance_loss(record(probs, top1)).item<double>(), expected, 1e-6);
  EXPECT_NEAR(balance_loss(record(probs, probs)).item<double>(), expected, 1e-6) << "soft merging counts top-1";
}

TEST(BalanceLoss, TopTwoCountsBothSlots) {
  // slots: {0,1}, {0,2}, {1,2} -> every expert has 2 of 6; loss = 3 * sum 1/3 P = 1.
  const auto probs = torch::tensor({{0.5, 0.4, 0.1}, {0.6, 0.1, 0.3}, {0.1, 0.5, 0.4}});
  EXPECT_NEAR(balance_loss(record(probs, topk_weights(probs, 2, TopkMode::kMask))).item<double>(), 1.0, 1e-6);
}

TEST(BalanceLoss, HasAGradientUnderSoftMerging) {
  auto logits = torch::tensor({{1.0, 0.0}, {2.0, 0.0}}, torch::requires_grad());
  const auto probs = logits.softmax(-1);
  balance_loss({"owner", "site", 0, true, logits, probs, probs, 1}).backward();
  EXPECT_GT(logits.grad().abs().sum().item<double>(), 1e-3);
}

TEST(ZLoss, IsTheMeanSquaredLogSumExp) {
  const auto logits = torch::tensor({{0.0, 0.0}, {1.0, 1.0}});
  const double expected = (std::pow(std::log(2.0), 2) + std::pow(1 + std::log(2.0), 2)) / 2;
  EXPECT_NEAR(z_loss({"owner", "site", 0, true, logits, logits.softmax(-1), logits.softmax(-1), 1}).item<double>(),
              expected, 1e-6);
}

TEST(Router, TemperatureDividesTheLogits) {
  RouterOptions options;
  options.temperature = 2.0;
  const Router router{torch::tensor({{1.0, 2.0}, {3.0, 4.0}}), options, "owner", "site", 0};
  // u W^T = (1 - 2, 3 - 4)
  EXPECT_TRUE(router.logits(torch::tensor({{1.0, -1.0}}), {}).equal(torch::tensor({{-0.5, -0.5}})));
}

TEST(Router, JitterScalesTheInputToBothSidesAndOnlyInTraining) {
  RouterOptions options;
  options.jitter = 0.25;
  const Router router{torch::ones({1, 1}), options, "owner", "site", 0};
  const auto input = torch::ones({1000, 1});
  nn::Pass pass;
  EXPECT_TRUE(router.logits(input, pass).equal(input));
  pass.training = true;
  const auto factors = router.logits(input, pass);
  EXPECT_GE(factors.min().item<float>(), 0.75f);
  EXPECT_LE(factors.max().item<float>(), 1.25f);
  // 1000 draws of uniform(0.75, 1.25): that none lies in an outer tenth has a chance of 0.9^1000.
  EXPECT_LT(factors.min().item<float>(), 0.8f);
  EXPECT_GT(factors.max().item<float>(), 1.2f);
}

TEST(Router, SentenceInputNeedsSentenceVectors) {
  Router router{torch::zeros({2, 4}), {RouterInput::kSentence}, "owner", "site", 0};
  nn::Pass pass;
  pass.offsets = {0, 3};
  EXPECT_THROW(router.route_from_pass(pass), UsageError);
}

TEST(Router, SentenceWeightsFollowTheSegments) {
  Router router{torch::tensor({{10.0, 0.0}, {0.0, 10.0}}), {RouterInput::kSentence}, "owner", "site", 0};
  nn::Pass pass;
  pass.offsets = {0, 1, 3};
  pass.segments = torch::tensor({0, 1, 1});
  pass.sentence = torch::tensor({{1.0, 0.0}, {0.0, 1.0}});
  const auto weights = router.route_from_pass(pass);
  EXPECT_TRUE(weights.argmax(-1).equal(torch::tensor({0, 1, 1})));
}

}  // namespace
}  // namespace moesaic::moe
