#include "moesaic/train/optimizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::train {
namespace {

torch::Tensor leaf(const torch::Tensor& value, const torch::Tensor& gradient = {}) {
  auto tensor = value.clone().requires_grad_(true);
  if (gradient.defined()) tensor.mutable_grad() = gradient.clone();
  return tensor;
}

TEST(AdamW, FirstStepByHand) {
  // t = 1: m / (1 - b1) = g, v / (1 - b2) = g^2, so p = p (1 - lr wd) - lr g / (|g| + eps).
  auto p = leaf(torch::tensor({1.0f, -2.0f}), torch::tensor({0.5f, -0.25f}));
  auto optimizer = make_adamw({{"p", p, 0.1, 0.01}}, {});
  optimizer->step(0.5);  // lr = 0.05
  EXPECT_NEAR(p[0].item<double>(), 1.0 * (1 - 0.05 * 0.01) - 0.05, 1e-6);
  EXPECT_NEAR(p[1].item<double>(), -2.0 * (1 - 0.05 * 0.01) + 0.05, 1e-6);
}

TEST(AdamW, EqualsTorchOverManyStepsAndGroups) {
  torch::manual_seed(1);
  const auto a = torch::randn({33, 7}), b = torch::randn({5});
  auto ours_a = leaf(a), ours_b = leaf(b), torch_a = leaf(a), torch_b = leaf(b);
  auto ours = make_adamw({{"a", ours_a, 1e-2, 0.1}, {"b", ours_b, 3e-3, 0.0}}, {0.8, 0.95, 1e-7});
  using torch::optim::AdamWOptions;
  std::vector<torch::optim::OptimizerParamGroup> groups;
  auto options = [](double lr, double decay) {
    return std::make_unique<AdamWOptions>(AdamWOptions(lr).betas({0.8, 0.95}).eps(1e-7).weight_decay(decay));
  };
  groups.emplace_back(std::vector<torch::Tensor>{torch_a}, options(1e-2, 0.1));
  groups.emplace_back(std::vector<torch::Tensor>{torch_b}, options(3e-3, 0.0));
  torch::optim::AdamW reference(groups, AdamWOptions(1e-2));
  for (int step = 0; step < 20; ++step) {
    const auto ga = torch::randn_like(a), gb = torch::randn_like(b);
    for (auto* t : {&ours_a, &torch_a}) t->mutable_grad() = ga.clone();
    for (auto* t : {&ours_b, &torch_b}) t->mutable_grad() = gb.clone();
    ours->step(1.0);
    reference.step();
  }
  EXPECT_LT((ours_a - torch_a).abs().max().item<double>(), 1e-6);
  EXPECT_LT((ours_b - torch_b).abs().max().item<double>(), 1e-6);
  EXPECT_GT((ours_a - a).abs().max().item<double>(), 0.05);
}

TEST(Adafactor, FirstStepByHand) {
  // t = 1: b2 = 0, v = g^2, u = sign(g), RMS(u) = 1; RMS(p) = sqrt((9 + 16) / 2).
  auto p = leaf(torch::tensor({3.0f, 4.0f}), torch::tensor({1.0f, -2.0f}));
  auto optimizer = make_adafactor({{"p", p, 0.1}}, {});
  optimizer->step(1.0);
  const double update = 0.1 * std::sqrt(12.5);
  EXPECT_NEAR(p[0].item<double>(), 3 - update, 1e-6);
  EXPECT_NEAR(p[1].item<double>(), 4 + update, 1e-6);
}

TEST(Adafactor, AGradientOfZeroLeavesTheTensorToItsDecay) {
  auto p = torch::ones({3}, torch::requires_grad());
  p.mutable_grad() = torch::zeros({3});
  OptimizedTensor tensor;
  tensor.name = "p";
  tensor.tensor = p;
  tensor.learning_rate = 0.1;
  make_adafactor({tensor}, {})->step(1.0);
  EXPECT_TRUE(p.detach().equal(torch::ones({3})));  // 0 / sqrt(0 + eps1) = 0
  tensor.weight_decay = 0.5;
  make_adafactor({tensor}, {})->step(1.0);
  EXPECT_TRUE(p.detach().allclose(torch::full({3}, 0.95)));  // 1 - 0.1 * 0.5
}

TEST(Adafactor, ATensorThatMayNotBeFactoredKeepsEveryMean) {
  OptimizedTensor tensor;
  tensor.name = "p";
  tensor.tensor = torch::ones({200, 200});
  tensor.may_factor = false;
  EXPECT_TRUE(make_adafactor({tensor}, {})->state().contains("p.v"));
  tensor.may_factor = true;
  EXPECT_TRUE(make_adafactor({tensor}, {})->state().contains("p.v_row"));
}

TEST(Adafactor, SmallTensorsMoveByTheLeastScale) {
  auto p = leaf(torch::zeros({4}), torch::full({4}, 5.0f));
  auto optimizer = make_adafactor({{"p", p, 0.1}}, {});
  optimizer->step(1.0);  // lr max(1e-3, 0) sign(g)
  EXPECT_NEAR(p[0].item<double>(), -1e-4, 1e-10);
}

/// The formula for one tensor, in doubles.
struct PlainAdafactor {
  std::vector<double> p, v;
  void step(const std::vector<double>& g, double t, double lr) {
    const double b2 = 1 - std::pow(t, -0.8);
    double u2 = 0, p2 = 0;
    std::vector<double> u(p.size());
    for (size_t i = 0; i < p.size(); ++i) {
      v[i] = b2 * v[i] + (1 - b2) * (g[i] * g[i] + 1e-30);
      u[i] = g[i] / std::sqrt(v[i]);
      u2 += u[i] * u[i];
      p2 += p[i] * p[i];
    }
    const double n = static_cast<double>(p.size());
    const double clip = std::max(1.0, std::sqrt(u2 / n));
    const double scale = std::max(1e-3, std::sqrt(p2 / n));
    for (size_t i = 0; i < p.size(); ++i) p[i] -= lr * scale * u[i] / clip;
  }
};

class AdafactorUnfactored : public testing::TestWithParam<int64_t> {};

TEST_P(AdafactorUnfactored, FiveStepsEqualTheFormula) {
  const int64_t initial_step = GetParam();
  torch::manual_seed(3);
  // A stack of experts: never factored, whatever its axes.
  auto p = leaf(torch::randn({2, 130, 140}));
  const auto flat = p.detach().flatten().to(torch::kFloat64);
  PlainAdafactor plain;
  plain.p.assign(flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel());
  plain.v.assign(plain.p.size(), 0.0);
  auto optimizer = make_adafactor({{"p", p, 0.3}}, {.initial_step = initial_step});
  for (int step = 0; step < 5; ++step) {
    const auto g = torch::randn(p.sizes());
    const auto g64 = g.flatten().to(torch::kFloat64);
    p.mutable_grad() = g;
    optimizer->step(1.0);
    plain.step({g64.data_ptr<double>(), g64.data_ptr<double>() + g64.numel()},
               static_cast<double>(initial_step + step + 1), 0.3);
  }
  const auto expected = torch::tensor(plain.p, torch::kFloat64);
  EXPECT_LT((p.detach().flatten() - expected).abs().max().item<double>(), 1e-5);
}
INSTANTIATE_TEST_SUITE_P(InitialSteps, AdafactorUnfactored, testing::Values(0, 1'100'000));

TEST(Adafactor, FactoredMatrixKeepsRowAndColumnMeans) {
  // g^2 of rank one is represented exactly, so the first update is sign(g).
  const auto rows = torch::rand({128, 1}) + 0.5, columns = torch::rand({1, 200}) + 0.5;
  auto p = leaf(torch::ones({128, 200}), rows * columns);
  auto optimizer = make_adafactor({{"w", p, 0.1, 0.0, true}}, {});
  optimizer->step(1.0);
  EXPECT_LT((p - 0.9).abs().max().item<double>(), 1e-4);
  const auto state = optimizer->state();
  EXPECT_EQ(state.at("w.v_row").sizes(), (std::vector<int64_t>{128}));
  EXPECT_EQ(state.at("w.v_col").sizes(), (std::vector<int64_t>{200}));
  EXPECT_FALSE(state.contains("w.v"));
}

TEST(Adafactor, NarrowMatrixIsNotFactored) {
  auto p = leaf(torch::ones({127, 200}));
  EXPECT_TRUE(make_adafactor({{"w", p, 0.1, 0.0, true}}, {})->state().contains("w.v"));
}

using Maker = std::function<std::unique_ptr<Optimizer>(std::vector<OptimizedTensor>)>;

class OptimizerState : public testing::TestWithParam<Maker> {};

TEST_P(OptimizerState, ThreePlusThreeStepsEqualSixBitForBit) {
  torch::manual_seed(5);
  const auto start = torch::randn({150, 140});
  std::vector<torch::Tensor> gradients;
  for (int i = 0; i < 6; ++i) gradients.push_back(torch::randn({150, 140}));
  auto run = [&](Optimizer& optimizer, torch::Tensor& p, int begin, int end) {
    for (int i = begin; i < end; ++i) {
      p.mutable_grad() = gradients[i].clone();
      optimizer.step(1.0);
    }
  };
  auto whole = leaf(start), part = leaf(start);
  auto first = GetParam()({{"w", whole, 0.01, 0.0, true}});
  run(*first, whole, 0, 6);

  auto second = GetParam()({{"w", part, 0.01, 0.0, true}});
  run(*second, part, 0, 3);
  formats::TensorMap saved;
  for (const auto& [name, tensor] : second->state()) saved[name] = tensor.clone();
  auto third = GetParam()({{"w", part, 0.01, 0.0, true}});
  third->load_state(saved);
  run(*third, part, 3, 6);
  EXPECT_TRUE(torch::equal(whole, part));
}

TEST_P(OptimizerState, WrongStateListsEveryOffender) {
  auto p = leaf(torch::zeros({3})), q = leaf(torch::zeros({2}));
  auto optimizer = GetParam()({{"p", p, 0.01}, {"q", q, 0.01}});
  formats::TensorMap state;
  for (const auto& [name, tensor] : optimizer->state()) {
    if (!name.starts_with("q.")) state[name] = name.starts_with("p.") ? torch::zeros({9}) : tensor;
  }
  state["extra.v"] = torch::zeros({1});
  try {
    optimizer->load_state(state);
    FAIL() << "expected a DataError";
  } catch (const DataError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("    q."));
    EXPECT_THAT(error.what(), testing::HasSubstr("got [9], expected [3]"));
    EXPECT_THAT(error.what(), testing::HasSubstr("unexpected (1):\n    extra.v"));
  }
}

TEST_P(OptimizerState, TensorsWithoutGradientStay) {
  auto p = leaf(torch::ones({3}));
  GetParam()({{"p", p, 0.01, 0.5}})->step(1.0);
  EXPECT_TRUE(torch::equal(p, torch::ones({3})));
}

INSTANTIATE_TEST_SUITE_P(Both, OptimizerState,
                         testing::Values([](auto tensors) { return make_adamw(std::move(tensors), {}); },
                                         [](auto tensors) { return make_adafactor(std::move(tensors), {}); }));

TEST(ClipGradients, ScalesToTheNormAndReportsTheOldOne) {
  auto a = leaf(torch::zeros({1}), torch::tensor({3.0f})), b = leaf(torch::zeros({1}), torch::tensor({4.0f}));
  const std::vector<OptimizedTensor> tensors{{"a", a}, {"b", b}};
  EXPECT_DOUBLE_EQ(clip_gradients(tensors, 0), 5.0);  // only measured
  EXPECT_EQ(a.grad().item<float>(), 3.0f);
  EXPECT_DOUBLE_EQ(clip_gradients(tensors, 10), 5.0);  // below the limit
  EXPECT_EQ(b.grad().item<float>(), 4.0f);
  EXPECT_DOUBLE_EQ(clip_gradients(tensors, 1), 5.0);
  EXPECT_NEAR(a.grad().item<double>(), 0.6, 1e-6);
  EXPECT_NEAR(b.grad().item<double>(), 0.8, 1e-6);
}

}  // namespace
}  // namespace moesaic::train
