#include "moesaic/moe/scale.h"

#include <gtest/gtest.h>

namespace moesaic::moe {
namespace {

constexpr double kTolerance = 1e-5;  // float32 sums in another order

torch::Tensor random(at::IntArrayRef shape, double scale = 1.0) {
  return (torch::randn(shape) * scale).set_requires_grad(true);
}

std::vector<torch::Tensor> gradients(const torch::Tensor& y, const std::vector<torch::Tensor>& leaves) {
  for (auto leaf : leaves) leaf.mutable_grad() = torch::Tensor();
  torch::manual_seed(11);
  (y * torch::randn_like(y)).sum().backward({}, /*retain_graph=*/true);
  std::vector<torch::Tensor> result;
  for (const auto& leaf : leaves) result.push_back(leaf.grad().clone());
  return result;
}

void expect_same(const torch::Tensor& y, const torch::Tensor& expected, const std::vector<torch::Tensor>& leaves) {
  EXPECT_LT((y - expected).abs().max().item<double>(), kTolerance * expected.abs().max().item<double>());
  const auto got = gradients(y, leaves), want = gradients(expected, leaves);
  for (size_t i = 0; i < leaves.size(); ++i) {
    EXPECT_LT((got[i] - want[i]).abs().max().item<double>(), kTolerance * want[i].abs().max().item<double>() + 1e-7)
        << "gradient of leaf " << i;
  }
}

torch::Tensor leaf(const torch::Tensor& t) { return t.detach().clone().set_requires_grad(true); }

class ScaleTest : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(5); }
  nn::Pass pass;
};

TEST_F(ScaleTest, MovOnHeadsEqualsTheNaiveForm) {
  const auto y = random({7, 3, 8});
  const auto router = random({4, 8}, 0.5), vectors = random({4, 3, 8});
  ScaleExperts mov(vectors, {router, {}, "owner", "k", 0}, 1.0);
  const auto p = at::linear(y, router).softmax(-1);
  const auto expected = y * torch::einsum("nhe,ehk->nhk", {p, vectors});
  expect_same(mov.forward(y, pass), expected, {y, router, vectors});
  std::vector<nn::RoutingRecord> routing;
  pass.routing = &routing;
  expect_same(mov.forward(y, pass), expected, {y, router, vectors});
  ASSERT_EQ(routing.size(), 1u);
  EXPECT_EQ(routing[0].rows_per_token, 3);
  EXPECT_EQ(routing[0].probs.sizes(), (std::vector<int64_t>{21, 4}));
}

/// Against float32 on the same rounded numbers: what is rounded is y' and the gradients of y, to 2^-9 (twice where `up`
/// follows), and those of the vectors and the router are sums in float32. More rows than are widened at once.
TEST_F(ScaleTest, Bfloat16ComputesInFloat32) {
  constexpr double kRounded = 0.01;
  auto distance = [](const torch::Tensor& a, const torch::Tensor& b) {
    return ((a.to(torch::kFloat32) - b).abs().max() / b.abs().max()).item<double>();
  };
  for (const bool mixes : {true, false}) {
    for (const int64_t top_k : {0, 2}) {
      const auto vectors = random(mixes ? at::IntArrayRef{4, 3, 8} : at::IntArrayRef{1, 3, 8});
      const auto flat = random(mixes ? at::IntArrayRef{4, 16} : at::IntArrayRef{1, 16});
      const auto head_router = random({4, 8}, 0.5), flat_router = random({4, 16}, 0.5);
      RouterOptions options;
      options.top_k = top_k;
      options.topk_mode = TopkMode::kRenorm;
      ScaleExperts heads(vectors, mixes ? Router{head_router, options, "o", "k", 0} : Router{}, 1.0);
      ScaleExperts ffn(flat, mixes ? Router{flat_router, options, "o", "f", 0} : Router{}, 1.0);
      const auto half = torch::kBFloat16;
      const auto y = leaf(torch::randn({130, 3, 8}).to(half)), act = leaf(torch::randn({130, 16}).to(half)),
                 up = leaf(torch::randn({130, 16}).to(half));
      const auto y32 = leaf(y.to(torch::kFloat32)), act32 = leaf(act.to(torch::kFloat32)),
                 up32 = leaf(up.to(torch::kFloat32));
      const auto got = heads.forward(y, pass), want = heads.forward(y32, pass);
      const auto got_ffn = ffn.forward_ffn(act, up, pass), want_ffn = ffn.forward_ffn(act32, up32, pass);
      EXPECT_EQ(got.scalar_type(), half);
      EXPECT_LT(distance(got, want.detach()), kRounded);
      EXPECT_LT(distance(got_ffn, want_ffn.detach()), kRounded);
      std::vector<torch::Tensor> shared{vectors}, shared_ffn{flat};
      if (mixes) shared.push_back(head_router), shared_ffn.push_back(flat_router);
      auto compare = [&](const torch::Tensor& halves, const torch::Tensor& wide, std::vector<torch::Tensor> of_half,
                         std::vector<torch::Tensor> of_wide, const std::vector<torch::Tensor>& both) {
        of_half.insert(of_half.end(), both.begin(), both.end());
        of_wide.insert(of_wide.end(), both.begin(), both.end());
        const auto a = gradients(halves.to(torch::kFloat32), of_half), b = gradients(wide, of_wide);
        for (size_t i = 0; i < a.size(); ++i) EXPECT_LT(distance(a[i], b[i]), kRounded) << "gradient of leaf " << i;
      };
      compare(got, want, {y}, {y32}, shared);
      compare(got_ffn, want_ffn, {act, up}, {act32, up32}, shared_ffn);
    }
  }
}

TEST_F(ScaleTest, MovOnTheFfnRoutesByTheActivatedBranchAlone) {
  const auto act = random({9, 16}), up = random({9, 16});
  const auto router = random({5, 16}, 0.5), vectors = random({5, 16});
  ScaleExperts mov(vectors, {router, {}, "owner", "ffn", 0}, 1.0);
  const auto expected = act * at::linear(act, router).softmax(-1).mm(vectors) * up;
  expect_same(mov.forward_ffn(act, up, pass), expected, {act, up, router, vectors});
  std::vector<nn::RoutingRecord> routing;
  pass.routing = &routing;
  expect_same(mov.forward_ffn(act, up, pass), expected, {act, up, router, vectors});
  EXPECT_EQ(routing.size(), 1u);
}

TEST_F(ScaleTest, FfnProductRoutesByTheProduct) {
  const auto act = random({9, 16}), up = random({9, 16});
  const auto router = random({5, 16}, 0.5), vectors = random({5, 16});
  ScaleExperts mov(vectors, {router, {RouterInput::kFfnProduct}, "owner", "ffn", 0}, 1.0);
  const auto expected = act * at::linear(act * up, router).softmax(-1).mm(vectors) * up;
  expect_same(mov.forward_ffn(act, up, pass), expected, {act, up, router, vectors});
}

TEST_F(ScaleTest, LayerInputIsSharedByTheHeads) {
  const auto y = random({7, 3, 8});
  pass.layer_input = random({7, 12});
  const auto router = random({4, 12}, 0.5), vectors = random({4, 3, 8});
  ScaleExperts mov(vectors, {router, {RouterInput::kLayerInput}, "owner", "k", 0}, 1.0);
  const auto p = at::linear(pass.layer_input, router).softmax(-1);
  expect_same(mov.forward(y, pass), y * torch::einsum("ne,ehk->nhk", {p, vectors}), {y, router, vectors});
}

TEST_F(ScaleTest, Ia3IsOneExpertWithoutARouter) {
  const auto y = random({7, 3, 8}), vectors = random({1, 3, 8});
  ScaleExperts ia3(vectors, {}, 1.0);
  expect_same(ia3.forward(y, pass), y * vectors, {y, vectors});
  const auto act = random({7, 16}), up = random({7, 16}), l = random({1, 16});
  ScaleExperts ffn(l, {}, 1.0);
  expect_same(ffn.forward_ffn(act, up, pass), act * up * l, {act, up, l});
}

TEST_F(ScaleTest, StartsAsTheIdentity) {
  const auto y = random({7, 3, 8});
  ScaleExperts mov(torch::ones({4, 3, 8}), {torch::randn({4, 8}), {}, "owner", "k", 0}, 1.0);
  EXPECT_LT((mov.forward(y, pass) - y).abs().max().item<double>(), 1e-6);
}

TEST_F(ScaleTest, MaskedTopkShrinksAndResidualDoesNot) {
  const auto y = torch::ones({5, 2, 4});
  const auto router = torch::randn({6, 4});
  RouterOptions options;
  options.top_k = 2;
  ScaleExperts masked(torch::ones({6, 2, 4}), {router, options, "owner", "k", 0}, 1.0);
  EXPECT_LT(masked.forward(y, pass).max().item<double>(), 0.999);
  options.topk_mode = TopkMode::kResidual;
  ScaleExperts residual(torch::ones({6, 2, 4}), {router, options, "owner", "k", 0}, 1.0);
  EXPECT_TRUE(residual.forward(y, pass).allclose(y, 1e-6, 1e-6));
}

TEST_F(ScaleTest, TopkOfAllExpertsEqualsSoft) {
  const auto y = random({5, 2, 4}), router = random({6, 4}), vectors = random({6, 2, 4});
  RouterOptions all;
  all.top_k = 6;
  ScaleExperts soft(vectors, {router, {}, "owner", "k", 0}, 1.0), topk(vectors, {router, all, "owner", "k", 0}, 1.0);
  expect_same(topk.forward(y, pass), soft.forward(y, pass), {y, router, vectors});
}

TEST_F(ScaleTest, EffectInterpolatesTowardsTheIdentity) {
  const auto y = torch::ones({2, 1, 4});
  ScaleExperts half(torch::full({1, 1, 4}, 3.0), {}, 0.5);
  EXPECT_TRUE(half.forward(y, pass).equal(torch::full({2, 1, 4}, 2.0)));  // 1 + 0.5 (3 - 1)
  // Equal vectors, so that the router's weights do not matter.
  const auto act = torch::ones({2, 4}), up = torch::full({2, 4}, 5.0);
  ScaleExperts mov(torch::full({3, 4}, 3.0), {torch::randn({3, 4}), {}, "owner", "ffn", 0}, 0.5);
  EXPECT_TRUE(mov.forward_ffn(act, up, pass).allclose(torch::full({2, 4}, 10.0), 1e-6));
}

TEST_F(ScaleTest, TemperatureFlattensTheRouter) {
  RouterOptions options;
  options.temperature = 2.5;
  const auto y = random({7, 3, 8}), heads_router = random({4, 8}), heads = random({4, 3, 8});
  ScaleExperts mov(heads, {heads_router, options, "owner", "k", 0}, 1.0);
  const auto p = (at::linear(y, heads_router) / 2.5).softmax(-1);
  expect_same(mov.forward(y, pass), y * torch::einsum("nhe,ehk->nhk", {p, heads}), {y, heads_router, heads});
  const auto act = random({9, 16}), up = random({9, 16}), router = random({5, 16}), vectors = random({5, 16});
  ScaleExperts ffn(vectors, {router, options, "owner", "ffn", 0}, 1.0);
  const auto expected = act * (at::linear(act, router) / 2.5).softmax(-1).mm(vectors) * up;
  expect_same(ffn.forward_ffn(act, up, pass), expected, {act, up, router, vectors});
}

TEST_F(ScaleTest, TheRowsWeightInterpolatesTowardsTheIdentity) {
  ScaleExperts ia3(torch::full({1, 1, 4}, 3.0), {}, 1.0);
  ia3.column = 1;
  pass.segments = torch::tensor({0, 1, 1}, torch::kInt64);
  pass.mixture = torch::tensor({{9.f, 0.f}, {9.f, 0.5f}});
  const auto scaled = ia3.forward(torch::ones({3, 1, 4}), pass);
  EXPECT_TRUE(scaled.flatten(1).select(1, 0).equal(torch::tensor({1.f, 2.f, 2.f})));  // 1 + w (3 - 1)
  const auto act = random({3, 16}), up = random({3, 16}), router = random({5, 16}), vectors = random({5, 16});
  ScaleExperts mov(vectors, {router, {}, "owner", "ffn", 0}, 1.0);
  mov.column = 1;
  const auto w = torch::tensor({0.f, 0.5f, 0.5f}).unsqueeze(1);
  const auto m = at::linear(act, router).softmax(-1).mm(vectors);
  expect_same(mov.forward_ffn(act, up, pass), act * (1 + w * (m - 1)) * up, {act, up, router, vectors});
}

TEST_F(ScaleTest, GradientsAgreeWithFiniteDifferencesInDouble) {
  const auto real = torch::TensorOptions().dtype(torch::kFloat64);
  const auto y0 = torch::randn({3, 2, 4}, real), r0 = torch::randn({3, 4}, real), v0 = torch::randn({3, 2, 4}, real);
  const auto direction = torch::randn({3, 2, 4}, real);
  std::vector<torch::Tensor> leaves{leaf(y0), leaf(r0), leaf(v0)};
  auto value = [&](const std::vector<torch::Tensor>& at) {
    ScaleExperts mov(at[2], {at[1], {}, "owner", "k", 0}, 1.0);
    return (mov.forward(at[0], pass) * direction).sum();
  };
  value(leaves).backward();
  constexpr double kStep = 1e-6;
  for (auto& tensor : leaves) {
    auto flat = tensor.detach().view(-1);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      torch::NoGradGuard no_grad;
      const double original = flat[i].item<double>();
      flat[i] = original + kStep;
      const double above = value(leaves).item<double>();
      flat[i] = original - kStep;
      const double below = value(leaves).item<double>();
      flat[i] = original;
      EXPECT_NEAR(tensor.grad().view(-1)[i].item<double>(), (above - below) / (2 * kStep), 1e-7);
    }
  }
}

}  // namespace
}  // namespace moesaic::moe
