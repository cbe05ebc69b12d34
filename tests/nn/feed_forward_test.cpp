#include "moesaic/nn/feed_forward.h"

#include <gtest/gtest.h>

#include "moesaic/nn/split.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::nn {
namespace {

using test::expect_gradients_match;
using test::leaf;
using test::relative_error;

torch::Tensor formula(const torch::Tensor& gate_up, GluKind kind) {
  const int64_t f = gate_up.size(1) / 2;
  const auto gate = gate_up.narrow(1, 0, f), up = gate_up.narrow(1, f, f);
  return (kind == GluKind::kSilu ? at::silu(gate) : at::gelu(gate, "tanh")) * up;
}

TEST(GatedLinearUnit, LiteralSwiglu) {
  // silu(2) = 2 / (1 + e^-2) = 1.7615942; times 3.
  const auto y = gated_linear_unit(torch::tensor({{2.f, 3.f}}), GluKind::kSilu);
  EXPECT_NEAR(y.item<double>(), 5.2847825, 1e-5);
}

TEST(GatedLinearUnit, FusedEqualsFormulaForwardAndBackward) {
  torch::manual_seed(0);
  for (GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh}) {
    for (int64_t f : {1, 9, 40}) {
      const auto x = (torch::randn({4, 2 * f}) * 5).requires_grad_(true), x64 = leaf(x.detach());
      const auto dy = torch::randn({4, f});
      const auto y = gated_linear_unit(x, kind), expected = formula(x64, kind);
      EXPECT_LT(relative_error(y, expected), 1e-6) << f;
      y.backward(dy);
      expected.backward(dy.to(torch::kFloat64));
      // 1 + tanh cancels where the gate is very negative, so the error is measured against the factors.
      const double scale = (x.abs().max() * dy.abs().max()).item<double>();
      EXPECT_LT((x.grad() - x64.grad()).abs().max().item<double>(), 1e-6 * scale) << f;
      EXPECT_TRUE(torch::equal(gated_linear_unit(x.detach(), kind), y.detach()));
    }
  }
}

/// Against float64 on the same rounded numbers; more rows than are widened at once.
TEST(GatedLinearUnit, Bfloat16GradientIsThatOfTheFormula) {
  torch::manual_seed(3);
  for (const GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh}) {
    const auto x = torch::randn({700, 24}).to(torch::kBFloat16).requires_grad_(true);
    const auto dy = torch::randn({700, 12}).to(torch::kBFloat16);
    const auto x64 = leaf(x.detach());
    const auto y = gated_linear_unit(x, kind), expected = gated_linear_unit(x64, kind);
    EXPECT_TRUE(torch::equal(y, gated_linear_unit(x.detach(), kind)));
    y.backward(dy);
    expected.backward(dy.to(torch::kFloat64));
    EXPECT_EQ(x.grad().scalar_type(), torch::kBFloat16);
    EXPECT_LT(relative_error(x.grad(), x64.grad()), 0.003);
  }
}

TEST(GatedLinearUnit, LargeInputsSaturate) {
  const auto y = gated_linear_unit(torch::tensor({{-1000.f, 1000.f, 1.f, 1.f}}), GluKind::kSilu);
  EXPECT_NEAR(y[0][0].item<double>(), 0.0, 1e-30);
  EXPECT_FLOAT_EQ(y[0][1].item<float>(), 1000.f);
}

TEST(GatedLinearUnit, GradientCheckInDouble) {
  for (GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh}) {
    expect_gradients_match([&](const auto& in) { return gated_linear_unit(in[0], kind); },
                           {leaf(torch::randn({3, 8}))});
  }
}

TEST(SplitColumns, GradientIsTheConcatenation) {
  const auto x = torch::randn({2, 5}).requires_grad_(true);
  const auto parts = split_columns(x, {2, 2, 1});
  (parts[0].sum() * 2 + parts[2].sum() * 3).backward();  // the middle part is not used
  EXPECT_TRUE(torch::equal(x.grad(), torch::tensor({{2.f, 2.f, 0.f, 0.f, 3.f}, {2.f, 2.f, 0.f, 0.f, 3.f}})));
}

/// Doubles what it is given and remembers that it was asked.
struct Doubling : ScaleAdapter {
  torch::Tensor forward(const torch::Tensor& y, Pass&) override { return y * 2; }
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, Pass&) override { return act * 2 * up; }
  bool trains() const override { return false; }
  int64_t saved_per_row() const override { return 0; }
};

TEST(FeedForward, EverySlotActsWhereItSays) {
  torch::manual_seed(1);
  FeedForward ffn(6, 10, /*bias=*/false, GluKind::kSilu, 0, torch::TensorOptions(torch::kFloat32));
  for (auto& p : ffn->parameters()) p.normal_();
  const auto weights = ffn->named_parameters();
  const auto x = torch::randn({3, 6});
  Pass pass;
  Sites sites;
  ffn->add_sites("mlp", sites);
  auto reference = [&](double gate, double branch, double up, double down) {
    const auto g = at::linear(x, weights["gate_proj.weight"]) * gate, u = at::linear(x, weights["up_proj.weight"]) * up;
    return at::linear(at::silu(g) * branch * u, weights["down_proj.weight"]) * down;
  };
  EXPECT_LT(relative_error(ffn->forward(x, pass), reference(1, 1, 1, 1)), 1e-5);
  for (const ScaleSite& site : sites.scales) {
    site.slot->adapters = {std::make_shared<Doubling>()};
    // Twice what down_proj reads is twice what it gives.
    const bool branch = site.kind == ScaleKind::kFfn;
    const auto expected =
        reference(site.name == "mlp.gate_proj" ? 2 : 1, branch ? 2 : 1, site.name == "mlp.up_proj" ? 2 : 1,
                  !branch && site.name == "mlp.down_proj" ? 2 : 1);
    EXPECT_LT(relative_error(ffn->forward(x, pass), expected), 1e-5) << site.name;
    site.slot->adapters.clear();
  }
}

}  // namespace
}  // namespace moesaic::nn
