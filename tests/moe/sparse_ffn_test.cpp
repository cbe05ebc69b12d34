#include "moesaic/moe/sparse_ffn.h"

#include <gtest/gtest.h>

#include "tests/nn/gradcheck.h"

namespace moesaic::moe {
namespace {

constexpr int64_t kWidth = 6, kRows = 9;

SparseFfnConfig config_of(int64_t experts, int64_t top_k, bool renormalize = true) {
  return {.hidden_size = kWidth, .experts = experts, .top_k = top_k, .width = 5, .renormalize = renormalize};
}

SparseFfn random_ffn(const SparseFfnConfig& config, torch::Dtype dtype = torch::kFloat64) {
  torch::manual_seed(1);
  SparseFfn ffn(config, /*layer=*/0, torch::dtype(dtype));
  torch::NoGradGuard no_grad;
  for (auto& weight : ffn->parameters()) weight.copy_(torch::randn(weight.sizes(), torch::kFloat64) * 0.5);
  return ffn;
}

torch::Tensor random_rows(torch::Dtype dtype = torch::kFloat64) {
  torch::manual_seed(2);
  return torch::randn({kRows, kWidth}, torch::kFloat64).to(dtype);
}

torch::Tensor run(SparseFfn& ffn, const torch::Tensor& x, std::vector<nn::RoutingRecord>* records = nullptr) {
  nn::Pass pass;
  pass.routing = records;
  return ffn->forward(x, pass);
}

torch::Tensor weight_of(SparseFfn& ffn, const std::string& name) { return ffn->named_parameters()[name]; }

/// A gated network by the formula.
torch::Tensor network(SparseFfn& ffn, const std::string& path, const torch::Tensor& x) {
  auto linear = [&](const char* name) { return weight_of(ffn, path + "." + name + ".weight").t(); };
  return (at::silu(x.mm(linear("gate_proj"))) * x.mm(linear("up_proj"))).mm(linear("down_proj"));
}

/// Every expert over every row, weighed by what the k most probable have.
torch::Tensor by_formula(SparseFfn& ffn, const SparseFfnConfig& config, const torch::Tensor& x) {
  const torch::Tensor p = x.mm(weight_of(ffn, "gate.weight").t()).softmax(-1);
  torch::Tensor w = topk_weights(p, config.top_k, config.renormalize ? TopkMode::kRenorm : TopkMode::kMask);
  torch::Tensor y = torch::zeros_like(x);
  for (int64_t e = 0; e < config.experts; ++e) {
    y = y + w.narrow(1, e, 1) * network(ffn, fmt::format("experts.{}", e), x);
  }
  if (config.shared_width == 0) return y;
  const torch::Tensor shared = network(ffn, "shared_expert", x);
  return y + (config.shared_gate ? x.mm(weight_of(ffn, "shared_expert_gate.weight").t()).sigmoid() * shared : shared);
}

std::vector<SparseFfnConfig> configs() {
  SparseFfnConfig shared = config_of(3, 2), gated = config_of(4, 2, false);
  shared.shared_width = gated.shared_width = 7;
  gated.shared_gate = true;
  // One expert; one and all of several; many, some of them without a row.
  return {config_of(1, 1, false), config_of(4, 1, false), config_of(4, 4), config_of(3, 2),
          config_of(3, 2, false), config_of(40, 2),       shared,          gated};
}

TEST(SparseFfn, IsTheFormula) {
  torch::NoGradGuard no_grad;
  for (const SparseFfnConfig& config : configs()) {
    SparseFfn ffn = random_ffn(config);
    EXPECT_LT(test::relative_error(run(ffn, random_rows()), by_formula(ffn, config, random_rows())), 1e-12)
        << config.experts << " experts, top " << config.top_k;
  }
}

TEST(SparseFfn, GradientsOfInputAndWeights) {
  for (const SparseFfnConfig& config : configs()) {
    SparseFfn ffn = random_ffn(config);
    const torch::Tensor x = random_rows().requires_grad_(true), direction = torch::randn_like(x);
    auto loss = [&] { return (run(ffn, x) * direction).sum(); };
    std::vector<torch::Tensor> inputs = ffn->parameters();
    for (auto& weight : inputs) weight.requires_grad_(true);
    inputs.push_back(x);
    const auto expected = torch::autograd::grad({(by_formula(ffn, config, x) * direction).sum()}, inputs, {}, {}, false,
                                                /*allow_unused=*/true);
    const auto got = torch::autograd::grad({loss()}, inputs, {}, {}, false, /*allow_unused=*/true);
    for (size_t i = 0; i < inputs.size(); ++i) {
      const torch::Tensor g = got[i].defined() ? got[i] : torch::zeros_like(inputs[i]);  // an expert without rows
      EXPECT_LT((g - expected[i]).abs().max().item<double>(), 1e-11) << config.experts << " experts, input " << i;
    }
  }
}

TEST(SparseFfn, FloatEqualsDouble) {
  for (const SparseFfnConfig& config : configs()) {
    SparseFfn exact = random_ffn(config), single = random_ffn(config, torch::kFloat32);
    torch::Tensor x = random_rows().requires_grad_(true), y = random_rows(torch::kFloat32).requires_grad_(true);
    run(exact, x).square().sum().backward();
    run(single, y).square().sum().backward();
    EXPECT_LT(test::relative_error(y.grad(), x.grad()), 1e-5) << config.experts;
  }
}

TEST(SparseFfn, ARouterThatChoosesTheSameOfEqualsHasNoGradient) {
  SparseFfn ffn = random_ffn(config_of(4, 2));
  {
    torch::NoGradGuard no_grad;
    for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
      for (int64_t e = 1; e < 4; ++e) {
        weight_of(ffn, fmt::format("experts.{}.{}.weight", e, part))
            .copy_(weight_of(ffn, fmt::format("experts.0.{}.weight", part)));
      }
    }
  }
  torch::Tensor router = weight_of(ffn, "gate.weight").requires_grad_(true);
  EXPECT_TRUE(ffn->trains());
  run(ffn, random_rows()).square().sum().backward();
  EXPECT_LT(router.grad().abs().max().item<double>(), 1e-12);
  router.mutable_grad() = torch::Tensor();
  {
    torch::NoGradGuard no_grad;
    weight_of(ffn, "experts.1.up_proj.weight").add_(0.1);
  }
  run(ffn, random_rows()).square().sum().backward();
  EXPECT_GT(router.grad().abs().max().item<double>(), 1e-4);
}

TEST(SparseFfn, RawWeightsReachTheRowsOfExpertsThatNobodyChose) {
  for (const bool renormalize : {true, false}) {
    SparseFfn ffn = random_ffn(config_of(40, 2, renormalize));
    torch::Tensor router = weight_of(ffn, "gate.weight").requires_grad_(true);
    std::vector<nn::RoutingRecord> records;
    run(ffn, random_rows(), &records).square().sum().backward();
    const torch::Tensor unchosen = records.at(0).weights.sum(0) == 0;
    ASSERT_GT(unchosen.sum().item<int64_t>(), 0);
    const torch::Tensor largest = router.grad().abs().amax(1).masked_select(unchosen);
    EXPECT_EQ(largest.max().item<double>() > 1e-12, !renormalize);
  }
}

TEST(SparseFfn, TheLowerOfEqualsIsChosen) {
  SparseFfn ffn = random_ffn(config_of(5, 2));
  torch::NoGradGuard no_grad;
  weight_of(ffn, "gate.weight").zero_();
  std::vector<nn::RoutingRecord> records;
  run(ffn, random_rows(), &records);
  EXPECT_TRUE(records[0].weights.equal(torch::tensor({0.5, 0.5, 0., 0., 0.}).to(torch::kFloat64).expand({kRows, 5})));
}

TEST(SparseFfn, RecordsClosedFormLosses) {
  // Logits (2,1,0,-1; 0,2,1,-1; 1,0,-1,2) of three tokens, two of four experts each: f = (2,2,1,1)/3 of them.
  SparseFfn ffn(SparseFfnConfig{.hidden_size = 3, .experts = 4, .top_k = 2, .width = 2}, 0,
                torch::dtype(torch::kFloat));
  torch::NoGradGuard no_grad;
  for (auto& weight : ffn->parameters()) weight.fill_(0.1);
  weight_of(ffn, "gate.weight").copy_(torch::tensor({{2., 1., 0., -1.}, {0., 2., 1., -1.}, {1., 0., -1., 2.}}).t());
  std::vector<nn::RoutingRecord> records;
  run(ffn, torch::eye(3), &records);
  EXPECT_FALSE(records[0].trained);
  EXPECT_NEAR(balance_loss(records[0]).item<double>(), 1.096863, 1e-6);
  EXPECT_NEAR(z_loss(records[0]).item<double>(), 5.954525, 1e-5);
}

TEST(SparseFfn, ThreadsDoNotChangeABit) {
  torch::NoGradGuard no_grad;
  SparseFfn ffn = random_ffn(config_of(4, 2), torch::kFloat32);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const torch::Tensor one = run(ffn, random_rows(torch::kFloat32));
  at::set_num_threads(2);
  EXPECT_TRUE(run(ffn, random_rows(torch::kFloat32)).equal(one));
  at::set_num_threads(threads);
}

TEST(SparseFfn, Int8StaysNearAndKeepsItsRouter) {
  torch::NoGradGuard no_grad;
  SparseFfnConfig config = config_of(4, 2);
  config.shared_width = 7;
  SparseFfn ffn = random_ffn(config, torch::kFloat32);
  const torch::Tensor x = random_rows(torch::kFloat32), before = run(ffn, x);
  ffn->quantize_int8();
  const torch::Tensor behind = run(ffn, x);
  EXPECT_FALSE(behind.equal(before));
  // Half a step of 1/127 of a row's largest weight, three products in a row.
  EXPECT_LT((behind - before).norm().item<double>(), 0.03 * before.norm().item<double>());
  EXPECT_EQ(weight_of(ffn, "gate.weight").numel(), 4 * kWidth);
  EXPECT_EQ(weight_of(ffn, "experts.0.up_proj.weight").numel(), 0);
}

}  // namespace
}  // namespace moesaic::moe
