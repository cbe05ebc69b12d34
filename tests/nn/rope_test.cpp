#include "moesaic/nn/rope.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::nn {
namespace {

using test::expect_gradients_match;
using test::leaf;
using test::relative_error;

torch::Tensor frequencies(RopeConfig config, int64_t head_dim, int64_t length = 1) {
  return Rope(std::move(config), head_dim).inverse_frequencies(length);
}

TEST(Rope, LiteralRotation) {
  // k = 4: frequencies 1 and 10000^(-1/2) = 0.01; position 2: angles 2 and 0.02. Pairs (0, 2) and (1, 3).
  const Rope rope({}, 4);
  const auto tables = rope.tables(torch::tensor({2}, torch::kInt64), {0, 1}, {3});
  const auto y = apply_rope(torch::tensor({1.f, 0.f, 0.f, 1.f}).view({1, 1, 4}), tables).view(-1);
  const auto expected = torch::tensor({std::cos(2.0), -std::sin(0.02), std::sin(2.0), std::cos(0.02)});
  EXPECT_LT(relative_error(y, expected), 1e-6);
}

TEST(Rope, ScoresDependOnDistanceOnly) {
  torch::manual_seed(0);
  const Rope rope({}, 16);
  const auto q = torch::randn({1, 1, 16}), k = torch::randn({1, 1, 16});
  auto score = [&](int64_t i, int64_t j) {
    const auto at_i = rope.tables(torch::tensor({i}, torch::kInt64), {0, 1}, {i + 1});
    const auto at_j = rope.tables(torch::tensor({j}, torch::kInt64), {0, 1}, {j + 1});
    return (apply_rope(q, at_i) * apply_rope(k, at_j)).sum().item<double>();
  };
  EXPECT_NEAR(score(7, 3), score(107, 103), 1e-4);
  EXPECT_GT(std::abs(score(7, 3) - score(9, 3)), 1e-3);
}

TEST(Rope, LinearDividesEveryFrequency) {
  const auto base = frequencies({}, 8), scaled = frequencies({.type = "linear", .factor = 4.0}, 8);
  EXPECT_TRUE(torch::equal(scaled, base / 4.0));
}

TEST(Rope, DynamicGrowsTheBaseBeyondTheOriginalLength) {
  const RopeConfig config{.type = "dynamic", .factor = 2.0, .original_max_position = 8};
  EXPECT_TRUE(torch::equal(frequencies(config, 4, 8), frequencies({}, 4)));
  // theta' = 10000 (2 * 16 / 8 - 1)^(4 / 2) = 90000; frequencies 1 and 1/300.
  EXPECT_LT(relative_error(frequencies(config, 4, 16), torch::tensor({1.0, 1.0 / 300})), 1e-6);
}

TEST(Rope, DynamicSequencesDoNotTouchEachOther) {
  const Rope rope({.type = "dynamic", .factor = 2.0, .original_max_position = 2}, 4);
  const auto positions = torch::tensor({0, 1, 0, 1, 2, 3}, torch::kInt64);
  const auto both = rope.tables(positions, {0, 2, 6}, {2, 4});
  const auto first = rope.tables(positions.slice(0, 0, 2), {0, 2}, {2});
  EXPECT_TRUE(torch::equal(both.cos.slice(0, 0, 2), first.cos));
}

TEST(Rope, Llama3KeepsShortWavesAndDividesLongOnes) {
  const RopeConfig config{.type = "llama3", .factor = 8.0, .original_max_position = 1000};
  const auto base = frequencies({}, 64), scaled = frequencies(config, 64);
  // Wavelengths 2 pi / f: below 1000 / 4 kept, above 1000 / 1 divided by 8, between in between.
  for (int64_t i = 0; i < 32; ++i) {
    const double f = base[i].item<double>(), g = scaled[i].item<double>(), wave = 2 * M_PI / f;
    if (wave < 250) EXPECT_EQ(g, f) << i;
    if (wave > 1000) EXPECT_FLOAT_EQ(g, f / 8) << i;
    if (wave > 250 && wave < 1000) {
      const double smooth = (1000 / wave - 1) / 3;
      EXPECT_NEAR(g, (1 - smooth) * f / 8 + smooth * f, 1e-6 * f) << i;
    }
  }
}

TEST(Rope, YarnRampsBetweenKeptAndDividedFrequencies) {
  const Rope rope({.type = "yarn", .factor = 4.0, .original_max_position = 1024}, 32);
  const auto base = frequencies({}, 32), scaled = rope.inverse_frequencies(1);
  // Dimension that turns t times in 1024 positions: 32 ln(1024 / (2 pi t)) / (2 ln 10000); t = 32: 2.82 -> 2,
  // t = 1: 8.85 -> 9.
  EXPECT_TRUE(at::allclose(scaled.slice(0, 0, 3), base.slice(0, 0, 3)));
  EXPECT_TRUE(at::allclose(scaled.slice(0, 9), base.slice(0, 9) / 4));
  const double ramp = (5.0 - 2.0) / 7.0;
  EXPECT_NEAR(scaled[5].item<double>() / base[5].item<double>(), ramp / 4 + 1 - ramp, 1e-6);
  EXPECT_DOUBLE_EQ(rope.attention_factor(), 0.1 * std::log(4.0) + 1.0);
}

TEST(Rope, YarnMagnitudes) {
  RopeConfig config{.type = "yarn", .factor = 10.0, .original_max_position = 64, .mscale = 2.0, .mscale_all_dim = 1.0};
  const double log10 = std::log(10.0);
  EXPECT_DOUBLE_EQ(Rope(config, 8).attention_factor(), (0.2 * log10 + 1) / (0.1 * log10 + 1));
  config.attention_factor = 0.5;
  const auto tables = Rope(config, 8).tables(torch::zeros({1}, torch::kInt64), {0, 1}, {1});
  EXPECT_TRUE(torch::equal(tables.cos, torch::full({1, 4}, 0.5f)));
}

TEST(Rope, RefusesUnknownTypesAndOddHeads) {
  EXPECT_THROW(Rope({.type = "longrope"}, 8), ConfigError);
  EXPECT_THROW(Rope({}, 7), ConfigError);
}

TEST(Rope, FusedEqualsDoubleOnStridedHeads) {
  torch::manual_seed(1);
  const Rope rope({}, 10);
  const auto tables = rope.tables(torch::arange(6), {0, 6}, {6});
  const auto wide = torch::randn({6, 50});
  const auto heads = wide.narrow(1, 10, 30).view({6, 3, 10});
  EXPECT_LT(relative_error(apply_rope(heads, tables), apply_rope(heads.to(torch::kFloat64), tables)), 1e-6);
}

TEST(Rope, GradientIsTheRotationBack) {
  torch::manual_seed(2);
  const Rope rope({}, 6);
  const auto tables = rope.tables(torch::arange(4), {0, 4}, {4});
  const auto x = torch::randn({4, 2, 6}).requires_grad_(true);
  const auto y = apply_rope(x, tables);
  y.backward(y.detach());
  EXPECT_LT(relative_error(x.grad(), x), 1e-6);  // R^T R = 1
  expect_gradients_match([&](const auto& in) { return apply_rope(in[0], tables); }, {leaf(torch::randn({4, 2, 6}))});
}

}  // namespace
}  // namespace moesaic::nn
