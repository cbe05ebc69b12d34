#include "moesaic/moe/low_rank.h"

#include <gtest/gtest.h>

#include "moesaic/moe/scale.h"
#include "moesaic/nn/kernels.h"
#include "tests/moe/largest_allocation.h"

namespace moesaic::moe {
namespace {

struct Shape {
  int64_t n, in;
  std::vector<int64_t> outs;
  std::vector<int64_t> targets;  // adapted members
  int64_t experts, rank;
};

/// A group with random base weights and experts at `targets`; the naive form beside it.
struct Fixture {
  explicit Fixture(const Shape& shape, RouterOptions options = {}, torch::ScalarType dtype = torch::kFloat32)
      : group(shape.in, shape.outs, /*bias=*/true, torch::TensorOptions().dtype(dtype)) {
    torch::manual_seed(3);
    const auto real = torch::TensorOptions().dtype(dtype);
    // Adapters are float32 on a bfloat16 base.
    const auto leaf = torch::TensorOptions().dtype(dtype == torch::kBFloat16 ? torch::kFloat32 : dtype);
    {
      torch::NoGradGuard no_grad;
      for (const auto& member : group.members()) {
        member->weight.normal_(0, 0.3);
        member->bias.normal_();
      }
    }
    for (int64_t index : shape.targets) add(index, shape.experts, shape.rank, options, leaf);
    x = torch::randn({shape.n, shape.in}, real).set_requires_grad(true);
    direction = torch::randn({shape.n, std::accumulate(shape.outs.begin(), shape.outs.end(), int64_t{0})}, real);
  }

  void add(int64_t index, int64_t count, int64_t rank, RouterOptions options = {}, torch::TensorOptions leaf = {}) {
    auto e = std::make_shared<LowRankExperts>();
    e->index = index;
    e->experts = count;
    e->rank = rank;
    e->scale = 4.0;
    const int64_t in = group.members()[index]->weight.size(1), out = group.outs()[index];
    e->a = torch::randn({count, rank, in}, leaf) * 0.3;
    e->b = torch::randn({count * rank, out}, leaf) * 0.3;
    if (count > 1) e->router = {torch::randn({count, in}, leaf) * 0.3, options, "owner", "site", 0};
    LowRankGroup::of(group)->add(e, /*trainable=*/true);
    experts.push_back(e);
  }

  /// The reference's einsums: every expert's output is made, then mixed. In the adapters' dtype.
  torch::Tensor naive(const torch::Tensor& x) const {
    const auto dtype = experts.front()->a.scalar_type();
    const auto input = x.to(dtype);
    std::vector<torch::Tensor> outputs;
    for (size_t j = 0; j < group.outs().size(); ++j) {
      const auto& member = group.members()[j];
      torch::Tensor y = at::linear(input, member->weight.to(dtype), member->bias.to(dtype));
      for (const auto& e : experts) {
        if (e->index != static_cast<int64_t>(j)) continue;
        const auto b = e->b.view({e->experts, e->rank, -1});
        const auto each = torch::einsum("nd,erd,ero->neo", {input, e->a, b});
        torch::Tensor p = torch::ones({input.size(0), 1}, input.options());
        if (e->experts > 1) {
          const RouterOptions& options = e->router.options;
          const torch::Tensor logits = at::linear(input, e->router.weight);
          p = topk_weights(((options.absolute ? logits.abs() : logits) / options.temperature).softmax(-1),
                           options.top_k, options.topk_mode);
        }
        y = y + e->scale * torch::einsum("ne,neo->no", {p, each});
      }
      outputs.push_back(y);
    }
    return torch::cat(outputs, 1);
  }

  std::vector<torch::Tensor> leaves() const {
    std::vector<torch::Tensor> result{x};
    for (const auto& e : experts) {
      result.push_back(e->a);
      result.push_back(e->b);
      if (e->experts > 1) result.push_back(e->router.weight);
    }
    return result;
  }

  std::vector<torch::Tensor> gradients(const torch::Tensor& y) const {
    for (auto leaf : leaves()) leaf.mutable_grad() = torch::Tensor();
    (y * direction).sum().backward();
    std::vector<torch::Tensor> result;
    for (auto& leaf : leaves()) result.push_back(leaf.grad().clone());
    return result;
  }

  nn::LinearGroup group;
  std::vector<std::shared_ptr<LowRankExperts>> experts;
  torch::Tensor x, direction;
};

void expect_equals_naive(Fixture& fixture, double tolerance, bool collect_routing = false) {
  std::vector<nn::RoutingRecord> routing;
  nn::Pass pass;
  if (collect_routing) pass.routing = &routing;
  const auto y = fixture.group.forward(fixture.x, pass);
  const auto expected = fixture.naive(fixture.x);
  EXPECT_LT((y - expected).abs().max().item<double>(), tolerance * expected.abs().max().item<double>());
  const auto got = fixture.gradients(y), want = fixture.gradients(expected);
  for (size_t i = 0; i < want.size(); ++i) {
    const double scale = std::max(want[i].abs().max().item<double>(), 1e-3);
    EXPECT_LT((got[i] - want[i]).abs().max().item<double>(), tolerance * scale) << "gradient of leaf " << i;
  }
  if (collect_routing) {
    EXPECT_EQ(routing.size(), fixture.experts.size());
  }
}

// float32 sums of up to a few hundred terms in another order: 1e-5 relative to the largest entry.
constexpr double kTolerance = 1e-5;

TEST(LowRankGroup, MoLoraEqualsTheNaiveEinsumWithAllGradients) {
  Fixture fixture({37, 24, {24, 8, 8}, {0, 1, 2}, 5, 3});
  expect_equals_naive(fixture, kTolerance);
}

TEST(LowRankGroup, SomeMembersAdaptedOthersNot) {
  Fixture fixture({11, 16, {12, 20, 4}, {0, 2}, 4, 2});
  expect_equals_naive(fixture, kTolerance);
}

TEST(LowRankGroup, LoraIsOneExpertWithoutARouter) {
  Fixture fixture({19, 16, {12, 20}, {0, 1}, 1, 4});
  expect_equals_naive(fixture, kTolerance);
}

TEST(LowRankGroup, RecordedRoutingGivesTheSameResult) {
  Fixture fixture({9, 16, {12, 20}, {0, 1}, 3, 2});
  expect_equals_naive(fixture, kTolerance, /*collect_routing=*/true);
}

TEST(LowRankGroup, DoublePrecisionEqualsNaiveToRounding) {
  Fixture fixture({13, 10, {6, 6}, {0, 1}, 3, 2}, {}, torch::kFloat64);
  expect_equals_naive(fixture, 1e-12);
}

TEST(LowRankGroup, Bfloat16BaseWithFloat32Adapters) {
  Fixture fixture({64, 24, {16, 8}, {0, 1}, 4, 3}, {}, torch::kBFloat16);
  // Inputs and weights are the same for both forms; what differs are bfloat16's roundings (2^-9) inside x A^T and the
  // output, and those of the gradient.
  expect_equals_naive(fixture, 0.02);
}

TEST(LowRankGroup, LoraAndMoLoraShareAGroup) {
  Fixture fixture({17, 16, {12, 20}, {0}, 1, 4});
  fixture.add(1, 3, 2);
  fixture.add(0, 2, 5);
  expect_equals_naive(fixture, kTolerance);
}

TEST(LowRankGroup, LargeRouterLogitsStayFinite) {
  Fixture fixture({21, 16, {12}, {0}, 5, 2});
  torch::NoGradGuard no_grad;
  fixture.experts[0]->router.weight.mul_(500);  // logits of a few hundred: exp of them overflows float32
  nn::Pass pass;
  const auto expected = fixture.naive(fixture.x);
  const auto difference = (fixture.group.forward(fixture.x, pass) - expected).abs().max().item<double>();
  EXPECT_LT(difference, 1e-3 * expected.abs().max().item<double>());
}

TEST(LowRankGroup, LeavesMayBeGivenOtherMemory) {
  Fixture fixture({9, 16, {12}, {0}, 3, 2});
  torch::NoGradGuard no_grad;
  fixture.experts[0]->a.set_data(2 * fixture.experts[0]->a);
  fixture.experts[0]->router.weight.set_data(-fixture.experts[0]->router.weight);
  nn::Pass pass;
  EXPECT_TRUE(fixture.group.forward(fixture.x, pass).allclose(fixture.naive(fixture.x), 1e-4, 1e-5));
}

TEST(LowRankGroup, TheRouterReadsTheInputBeforeDropout) {
  Fixture fixture({9, 16, {12}, {0}, 3, 2});
  fixture.experts[0]->dropout = 0.5;
  std::vector<nn::RoutingRecord> routing;
  nn::Pass pass;
  pass.training = true;
  pass.routing = &routing;
  fixture.group.forward(fixture.x, pass);
  ASSERT_EQ(routing.size(), 1u);
  EXPECT_TRUE(routing[0].probs.allclose(at::linear(fixture.x, fixture.experts[0]->router.weight).softmax(-1), 1e-5));
}

TEST(LowRankGroup, TopkModes) {
  for (TopkMode mode : {TopkMode::kMask, TopkMode::kRenorm}) {
    RouterOptions options;
    options.top_k = 2;
    options.topk_mode = mode;
    Fixture fixture({21, 16, {12}, {0}, 5, 2}, options);
    expect_equals_naive(fixture, kTolerance);
  }
}

TEST(LowRankGroup, TemperatureFlattensTheRouter) {
  RouterOptions options;
  options.temperature = 2.5;
  Fixture fixture({21, 16, {12, 4}, {0, 1}, 5, 2}, options);
  expect_equals_naive(fixture, kTolerance);
  expect_equals_naive(fixture, kTolerance, /*collect_routing=*/true);
}

TEST(LowRankGroup, AbsoluteLogits) {
  RouterOptions options;
  options.absolute = true;
  options.temperature = 0.5;
  Fixture fixture({21, 16, {12, 4}, {0, 1}, 5, 2}, options);
  expect_equals_naive(fixture, kTolerance);
  expect_equals_naive(fixture, kTolerance, /*collect_routing=*/true);
}

TEST(LowRankGroup, NoGradientReachesAFrozenInput) {
  Fixture fixture({9, 16, {12}, {0}, 3, 2});
  nn::Pass pass;
  const auto frozen = fixture.x.detach();
  fixture.group.forward(frozen, pass).sum().backward();
  EXPECT_TRUE(fixture.experts[0]->a.grad().defined());
  EXPECT_FALSE(frozen.grad().defined());
}

TEST(LowRankGroup, DisabledAdapterIsTheBase) {
  Fixture fixture({9, 16, {12}, {0}, 3, 2});
  nn::Pass pass;
  const auto adapted = fixture.group.forward(fixture.x, pass);
  nn::AdapterDisabled guard;
  const auto base = fixture.group.forward(fixture.x, pass);
  EXPECT_TRUE(base.equal(fixture.group.base(fixture.x, pass)));
  EXPECT_FALSE(base.allclose(adapted));
}

TEST(LowRankGroup, TwoAdaptersAddTheirDeltas) {
  Fixture fixture({9, 16, {12}, {0, 0}, 3, 2});
  expect_equals_naive(fixture, kTolerance);
}

TEST(LowRankGroup, TheRowsWeightsMultiplyEachAdapter) {
  // y = W x + w_0 delta_0 + w_1 delta_1, a row's w from its sequence.
  Fixture fixture({5, 16, {12}, {0, 0}, 3, 2});
  nn::Pass pass;
  const auto base = fixture.group.base(fixture.x, pass);
  std::vector<torch::Tensor> deltas;
  pass.segments = torch::tensor({0, 0, 1, 1, 1}, torch::kInt64);
  fixture.experts[0]->column = 0;
  fixture.experts[1]->column = 1;
  for (int64_t column = 0; column < 2; ++column) {
    pass.mixture = torch::zeros({2, 2});
    pass.mixture.select(1, column).fill_(1);
    deltas.push_back(fixture.group.forward(fixture.x, pass) - base);
  }
  pass.mixture = torch::tensor({{0.25f, 2.f}, {1.f, 0.f}});
  const auto weights = pass.mixture.index_select(0, pass.segments);
  const auto expected = base + weights.narrow(1, 0, 1) * deltas[0] + weights.narrow(1, 1, 1) * deltas[1];
  const auto y = fixture.group.forward(fixture.x, pass);
  EXPECT_TRUE(y.allclose(expected, 1e-4, 1e-5));
  const auto got = fixture.gradients(y);
  const auto want = fixture.gradients(expected);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(got[i].allclose(want[i], 1e-3, 1e-4)) << i;
}

TEST(LowRankGroup, ScalesAndDeltasStandTogether) {
  // y = (W (x m) + b) l + scale B A x.
  Fixture fixture({7, 16, {12}, {0}, 1, 2});
  nn::Pass pass;
  const auto& member = fixture.group.members()[0];
  const auto m = torch::randn({1, 16}).set_requires_grad(true), l = torch::randn({1, 12}).set_requires_grad(true);
  fixture.group.input_slot(0).adapters = {std::make_shared<ScaleExperts>(m, Router{}, 1.0)};
  fixture.group.output_slot(0).adapters = {std::make_shared<ScaleExperts>(l, Router{}, 1.0)};
  const auto& e = *fixture.experts[0];
  const auto expected = at::linear(fixture.x * m, member->weight, member->bias) * l +
                        e.scale * at::linear(fixture.x, e.a.squeeze(0)).mm(e.b);
  const auto y = fixture.group.forward(fixture.x, pass);
  EXPECT_TRUE(y.allclose(expected, 1e-4, 1e-5));
  const auto got = fixture.gradients(y);
  const auto want = fixture.gradients(expected);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(got[i].allclose(want[i], 1e-3, 1e-4)) << i;
  EXPECT_TRUE(m.grad().defined() && l.grad().defined());
}

TEST(LowRankGroup, AnInt8BaseIsTrainedThrough) {
  Fixture fixture({7, 16, {12}, {0}, 3, 2});
  nn::Pass pass;
  const auto [rows, scales] = nn::quantize_rows_int8(fixture.group.members()[0]->weight.detach());
  fixture.group.quantize_int8();
  const auto y = fixture.group.forward(fixture.x, pass);
  const auto got = fixture.gradients(y);
  // The same with the rounded weights as floats.
  Fixture floats({7, 16, {12}, {0}, 3, 2});
  {
    torch::NoGradGuard no_grad;
    floats.group.members()[0]->weight.copy_(rows.to(torch::kFloat32) * scales.unsqueeze(1));
  }
  const auto expected = floats.group.forward(floats.x, pass);
  // Decoding's kernel rounds x to 16 bits.
  EXPECT_TRUE(y.allclose(expected, 1e-3, 1e-3));
  const auto want = floats.gradients(expected);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(got[i].allclose(want[i], 1e-3, 1e-3)) << i;
}

TEST(LowRankGroup, AFrozenAdapterGetsNoGradientButPassesOneOn) {
  Fixture fixture({7, 16, {12}, {0}, 3, 2});
  nn::Pass pass;
  const auto want = fixture.gradients(fixture.group.forward(fixture.x, pass))[0];
  for (auto leaf : fixture.leaves()) leaf.mutable_grad() = torch::Tensor();
  auto& e = *fixture.experts[0];
  for (torch::Tensor* leaf : {&e.a, &e.b, &e.router.weight}) leaf->set_requires_grad(false);
  (fixture.group.forward(fixture.x, pass) * fixture.direction).sum().backward();
  EXPECT_TRUE(fixture.x.grad().allclose(want, 1e-5, 1e-6));
  EXPECT_FALSE(e.a.grad().defined());
}

/// With the pairs frozen, the gradients of x and of the routers are what they are with everything trained. `first`: the
/// input requires none, as at the lowest adapted block.
void expect_routers_alone_learn(const RouterOptions& options, torch::ScalarType dtype, bool first) {
  const double tolerance = dtype == torch::kBFloat16 ? 0.02 : 1e-4;
  Fixture fixture({19, 16, {12, 4}, {0, 1}, 3, 2}, options, dtype);
  nn::Pass pass;
  const auto want = fixture.gradients(fixture.group.forward(fixture.x, pass));
  for (auto leaf : fixture.leaves()) leaf.mutable_grad() = torch::Tensor();
  for (const auto& e : fixture.experts) {
    e->a.set_requires_grad(false);
    e->b.set_requires_grad(false);
  }
  EXPECT_TRUE(fixture.group.delta->trains());
  const torch::Tensor x = first ? fixture.x.detach() : fixture.x;
  (fixture.group.forward(x, pass) * fixture.direction).sum().backward();
  const auto leaves = fixture.leaves();
  for (size_t i = 0; i < leaves.size(); ++i) {
    const bool learns = i == 0 ? !first : i % 3 == 0;  // x, then a, b and router of each site
    ASSERT_EQ(leaves[i].grad().defined(), learns) << i;
    if (learns) EXPECT_TRUE(leaves[i].grad().allclose(want[i], tolerance, tolerance)) << i;
  }
}

TEST(LowRankGroup, RoutersLearnWhereTheirExpertsAreFrozen) {
  RouterOptions top, absolute;
  top.top_k = 2;
  absolute.absolute = true;
  for (const bool first : {false, true}) {
    expect_routers_alone_learn({}, torch::kFloat32, first);
    expect_routers_alone_learn({}, torch::kBFloat16, first);
    expect_routers_alone_learn(top, torch::kFloat32, first);
    expect_routers_alone_learn(absolute, torch::kFloat32, first);
  }
}

TEST(LowRankGroup, AFrozenAdapterBesideATrainedOne) {
  // The frozen one's rows come first; a gradient for them would be another leaf's.
  Fixture fixture({19, 16, {12}, {0, 0}, 3, 2});
  nn::Pass pass;
  const auto want = fixture.gradients(fixture.group.forward(fixture.x, pass));
  for (auto leaf : fixture.leaves()) leaf.mutable_grad() = torch::Tensor();
  for (torch::Tensor* leaf : {&fixture.experts[0]->a, &fixture.experts[0]->b, &fixture.experts[0]->router.weight}) {
    leaf->set_requires_grad(false);
  }
  (fixture.group.forward(fixture.x, pass) * fixture.direction).sum().backward();
  const auto leaves = fixture.leaves();
  for (size_t i = 0; i < leaves.size(); ++i) {
    const bool learns = i == 0 || i > 3;
    ASSERT_EQ(leaves[i].grad().defined(), learns) << i;
    if (learns) EXPECT_TRUE(leaves[i].grad().allclose(want[i], 1e-4, 1e-5)) << i;
  }
}

TEST(LowRankGroup, RemovedExpertsLeaveTheRestAsItWas) {
  Fixture fixture({9, 16, {12, 4}, {0, 1}, 3, 2});
  LowRankGroup::of(fixture.group)->remove(fixture.experts[0], fixture.group);
  ASSERT_NE(fixture.group.delta, nullptr);
  const auto last = fixture.experts[1];
  fixture.experts.erase(fixture.experts.begin());
  expect_equals_naive(fixture, kTolerance);
  LowRankGroup::of(fixture.group)->remove(last, fixture.group);
  EXPECT_EQ(fixture.group.delta, nullptr);
}

TEST(LowRankGroup, DropoutKeepsTheMeanAndOnlyActsInTraining) {
  Fixture fixture({4, 16, {12}, {0}, 1, 2});
  fixture.experts[0]->dropout = 0.5;
  nn::Pass pass;
  EXPECT_TRUE(fixture.group.forward(fixture.x, pass).allclose(fixture.naive(fixture.x), 1e-4, 1e-5));
  pass.training = true;
  torch::NoGradGuard no_grad;
  torch::Tensor sum = torch::zeros({4, 12});
  constexpr int kDraws = 4000;
  for (int i = 0; i < kDraws; ++i) sum += fixture.group.forward(fixture.x, pass);
  const auto expected = fixture.naive(fixture.x);
  // The mean of 4000 draws has a standard error below 2 % of the largest entry here.
  EXPECT_LT((sum / kDraws - expected).abs().max().item<double>(), 0.08 * expected.abs().max().item<double>());
}

TEST(LowRankGroup, NothingOfShapeRowsTimesExpertsTimesWidthIsMade) {
  constexpr int64_t kRows = 256, kExperts = 32, kWidth = 64;
  Fixture fixture({kRows, kWidth, {kWidth, kWidth}, {0, 1}, kExperts, 1});
  size_t largest = 0;
  {
    LargestAllocation meter;
    nn::Pass pass;
    (fixture.group.forward(fixture.x, pass) * fixture.direction).sum().backward();
    largest = meter.bytes();
  }
  // The largest legitimate tensor is the group's output or the joint x A^T with its logits: [N, 2*E*(r+1)] here.
  EXPECT_LE(largest, 4 * kRows * 2 * kExperts * 2 + 4096);
  EXPECT_LT(largest, 4 * kRows * kExperts * kWidth / 8);
  {
    LargestAllocation meter;
    (fixture.naive(fixture.x) * fixture.direction).sum().backward();
    EXPECT_GE(meter.bytes(), 4u * kRows * kExperts * kWidth) << "the meter sees the naive form's tensor";
  }
}

}  // namespace
}  // namespace moesaic::moe
