#include "moesaic/nn/attention.h"

#include <gtest/gtest.h>

#include "moesaic/nn/kernels.h"
#include "moesaic/nn/kv_cache.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::nn {
namespace {

using test::expect_gradients_match;
using test::leaf;
using test::relative_error;

/// The definition, one query at a time, differentiable.
torch::Tensor definition(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                         const std::vector<int64_t>& offsets, const AttentionOptions& options) {
  const int64_t group = q.size(1) / k.size(1);
  std::vector<torch::Tensor> rows;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    for (int64_t n = offsets[b]; n < offsets[b + 1]; ++n) {
      const int64_t first = options.window > 0 ? std::max(offsets[b], n - options.window + 1) : offsets[b];
      std::vector<torch::Tensor> heads;
      for (int64_t h = 0; h < q.size(1); ++h) {
        auto scores = at::mv(k.select(1, h / group).slice(0, first, n + 1), q[n][h]) * options.scale;
        if (options.softcap > 0) scores = at::tanh(scores / options.softcap) * options.softcap;
        heads.push_back(at::mv(v.select(1, h / group).slice(0, first, n + 1).t(), at::softmax(scores, 0)));
      }
      rows.push_back(at::stack(heads));
    }
  }
  return at::stack(rows);
}

struct Case {
  std::string name;
  int64_t heads, kv_heads, k;
  AttentionOptions options;
};
const std::vector<Case> kCases{
    {"mha", 2, 2, 4, {.scale = 0.5}},
    {"gqa", 6, 2, 6, {.scale = 0.4}},
    {"mqa, odd width", 3, 1, 5, {.scale = 0.3}},
    {"window", 4, 2, 4, {.scale = 0.5, .window = 3}},
    {"window longer than all", 4, 2, 4, {.scale = 0.5, .window = 100}},
    {"softcap", 4, 2, 4, {.scale = 0.5, .softcap = 0.7}},
    {"softcap and window", 4, 2, 4, {.scale = 0.5, .softcap = 0.7, .window = 2}},
};
const std::vector<int64_t> kOffsets{0, 5, 6, 13};

std::vector<torch::Tensor> inputs(const Case& c, int64_t rows, torch::Dtype dtype) {
  return {torch::randn({rows, c.heads, c.k}, dtype), torch::randn({rows, c.kv_heads, c.k}, dtype),
          torch::randn({rows, c.kv_heads, c.k}, dtype)};
}

TEST(RaggedAttention, LiteralUniformScores) {
  // Keys 0: every visible value weighs the same. Sequence 1 is rows 0-2, sequence 2 row 3.
  const auto q = torch::ones({4, 1, 2}), k = torch::zeros({4, 1, 2});
  const auto v = torch::tensor({0.f, 0.f, 2.f, 20.f, 4.f, 40.f, 7.f, 8.f}).view({4, 1, 2});
  const auto out = ragged_attention(q, k, v, {0, 3, 4}, {.scale = 1.0}).view({4, 2});
  EXPECT_TRUE(at::allclose(out, torch::tensor({{0.f, 0.f}, {1.f, 10.f}, {2.f, 20.f}, {7.f, 8.f}})));
}

TEST(RaggedAttention, EqualsTheDefinitionForwardAndBackward) {
  torch::manual_seed(0);
  for (const Case& c : kCases) {
    auto x = inputs(c, 13, torch::kFloat32);
    std::vector<torch::Tensor> exact;
    for (auto& t : x) {
      exact.push_back(leaf(t));
      t.requires_grad_(true);
    }
    const auto out = ragged_attention(x[0], x[1], x[2], kOffsets, c.options);
    const auto expected = definition(exact[0], exact[1], exact[2], kOffsets, c.options);
    EXPECT_LT(relative_error(out, expected), 1e-6) << c.name;
    const auto d_out = torch::randn_like(out);
    out.backward(d_out);
    expected.backward(d_out.to(torch::kFloat64));
    for (int i = 0; i < 3; ++i)
      EXPECT_LT(relative_error(x[i].grad(), exact[i].grad()), 3e-6) << c.name << " input " << i;
    torch::NoGradGuard no_grad;
    EXPECT_LT(relative_error(ragged_attention(x[0], x[1], x[2], kOffsets, c.options), expected), 1e-6) << c.name;
  }
}

TEST(RaggedAttention, GradientCheckInDouble) {
  torch::manual_seed(1);
  for (const Case& c : kCases) {
    auto x = inputs(c, 6, torch::kFloat64);
    expect_gradients_match([&](const auto& in) { return ragged_attention(in[0], in[1], in[2], {0, 4, 6}, c.options); },
                           {leaf(x[0]), leaf(x[1]), leaf(x[2])});
  }
}

TEST(RaggedAttention, LongSequencesCrossTheKernelsBlocks) {
  torch::manual_seed(2);
  for (int64_t window : {0, 600}) {
    const Case c{"long", 2, 1, 8, {.scale = 0.35, .window = window}};
    auto x = inputs(c, 1100, torch::kFloat32);
    const auto out = ragged_attention(x[0], x[1], x[2], {0, 1100}, c.options);
    for (int64_t n : {0, 511, 512, 599, 600, 1099}) {  // single rows of the definition
      const int64_t first = window > 0 ? std::max<int64_t>(0, n - window + 1) : 0;
      for (int64_t h : {0, 1}) {
        const auto scores = at::mv(x[1].select(1, 0).slice(0, first, n + 1), x[0][n][h]) * 0.35;
        const auto expected = at::mv(x[2].select(1, 0).slice(0, first, n + 1).t(), at::softmax(scores, 0));
        EXPECT_LT(relative_error(out[n][h], expected), 1e-5) << n;
      }
    }
  }
}

TEST(RaggedAttention, GradientsOfLongSequencesCrossTheKernelsBlocks) {
  torch::manual_seed(6);
  for (const auto& [softcap, window, causal] : std::vector<std::tuple<double, int64_t, bool>>{
           {0, 0, true}, {0, 150, true}, {2, 0, true}, {0, 40, false}, {0, 0, false}}) {
    const AttentionOptions options{.scale = 0.35, .softcap = softcap, .window = window, .causal = causal};
    const Case c{"long", 4, 2, 12, options};
    const std::vector<int64_t> offsets{0, 310, 311, 600};
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
      auto x = inputs(c, 600, dtype);
      std::vector<torch::Tensor> exact;
      for (auto& t : x) {
        exact.push_back(leaf(t));
        t.requires_grad_(true);
      }
      const auto out = ragged_attention(x[0], x[1], x[2], offsets, options);
      const auto expected = ragged_attention(exact[0], exact[1], exact[2], offsets, options);  // by the formula
      const auto d_out = torch::randn_like(out);
      out.backward(d_out);
      expected.backward(d_out.to(torch::kFloat64));
      const bool half = dtype == torch::kBFloat16;  // 8 bits: the outputs and the gradients are rounded once, and the
                                                    // outputs' rounding comes back in each row's sum
      SCOPED_TRACE(
          fmt::format("softcap {}, window {}, causal {}, {}", softcap, window, causal, half ? "half" : "float"));
      EXPECT_LT(relative_error(out.detach(), expected.detach()), half ? 1.0 / 256 : 1e-6);
      for (int i = 0; i < 3; ++i) EXPECT_LT(relative_error(x[i].grad(), exact[i].grad()), half ? 1.0 / 128 : 3e-6) << i;
    }
  }
}

TEST(RaggedAttention, NeighboursDoNotMatter) {
  torch::manual_seed(3);
  const Case c{"gqa", 4, 2, 8, {.scale = 0.35}};
  auto x = inputs(c, 13, torch::kFloat32);
  const auto all = ragged_attention(x[0], x[1], x[2], kOffsets, c.options);
  for (size_t b = 0; b + 1 < kOffsets.size(); ++b) {
    auto rows = [&](const torch::Tensor& t) { return t.slice(0, kOffsets[b], kOffsets[b + 1]); };
    const auto alone =
        ragged_attention(rows(x[0]), rows(x[1]), rows(x[2]), {0, kOffsets[b + 1] - kOffsets[b]}, c.options);
    EXPECT_TRUE(torch::equal(alone, rows(all))) << b;
  }
}

TEST(CachedAttention, AnyChunkingEqualsFull) {
  torch::manual_seed(4);
  // Rows per sequence in each step: none, prefill, single tokens, chunks.
  const std::vector<std::vector<int64_t>> steps{{0, 3}, {3, 2}, {1, 1}, {2, 0}, {1, 4}, {0, 1}, {1, 1}};
  const std::vector<int64_t> lengths{8, 12};
  for (const Case& c : kCases) {
    std::vector<std::vector<torch::Tensor>> x;
    std::vector<torch::Tensor> full;
    for (int64_t length : lengths) {
      x.push_back(inputs(c, length, torch::kFloat32));
      full.push_back(ragged_attention(x.back()[0], x.back()[1], x.back()[2], {0, length}, c.options));
    }
    KvCache cache(1, c.kv_heads, c.k, 2, torch::TensorOptions(torch::kFloat32));
    std::vector<int64_t> done{0, 0};
    for (const auto& counts : steps) {
      Pass pass;
      pass.cache = &cache;
      pass.offsets = {0, counts[0], counts[0] + counts[1]};
      std::vector<torch::Tensor> step;
      for (int i = 0; i < 3; ++i) {
        step.push_back(at::cat({x[0][i].narrow(0, done[0], counts[0]), x[1][i].narrow(0, done[1], counts[1])}));
      }
      const auto out = cached_attention(step[0], step[1], step[2], 0, pass, c.options);
      for (int b : {0, 1}) {
        if (counts[b] == 0) continue;
        const auto got = out.slice(0, pass.offsets[b], pass.offsets[b + 1]);
        EXPECT_LT(relative_error(got, full[b].narrow(0, done[b], counts[b])), 2e-6) << c.name << " after " << done[b];
        done[b] += counts[b];
      }
      cache.commit(counts);
    }
  }
}

TEST(CachedAttention, ARowOfATextThatIsReadHasTheSameBitsInAnyParts) {
  torch::manual_seed(5);
  const AlikeRows alike(AlikeRows::Number::kMany);
  constexpr int64_t kLength = 600;
  std::vector<Case> cases = kCases;
  cases.push_back({"long window", 4, 2, 16, {.scale = 0.25, .window = 70}});
  for (const Case& c : cases) {
    const auto x = inputs(c, kLength, torch::kFloat32);
    auto read = [&](const std::vector<int64_t>& parts) {
      KvCache cache(1, c.kv_heads, c.k, 1, torch::TensorOptions(torch::kFloat32));
      std::vector<torch::Tensor> outs;
      int64_t done = 0;
      for (const int64_t count : parts) {
        Pass pass;
        pass.cache = &cache;
        pass.offsets = {0, count};
        auto rows = [&](int i) { return x[i].narrow(0, done, count); };
        outs.push_back(cached_attention(rows(0), rows(1), rows(2), 0, pass, c.options));
        cache.commit({count});
        done += count;
      }
      return at::cat(outs);
    };
    const auto whole = read({kLength});
    EXPECT_LT(relative_error(whole, ragged_attention(x[0], x[1], x[2], {0, kLength}, c.options)), 1e-6) << c.name;
    EXPECT_TRUE(torch::equal(read({1, 31, 64, 1, 300, 203}), whole)) << c.name;
    EXPECT_TRUE(torch::equal(read({257, 255, 88}), whole)) << c.name;
  }
}

/// Every query sees all keys of its sequence: out[n, h] = sum_j softmax_j(scale q . k_j + bias[h, n, j]) v_j.
torch::Tensor seen_whole(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                         const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets, double scale,
                         RelativeBias bias) {
  const int64_t group = q.size(1) / k.size(1);
  std::vector<torch::Tensor> rows;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    const int64_t begin = key_offsets[b], end = key_offsets[b + 1];
    for (int64_t n = offsets[b]; n < offsets[b + 1]; ++n) {
      std::vector<torch::Tensor> heads;
      for (int64_t h = 0; h < q.size(1); ++h) {
        auto scores = at::mv(k.select(1, h / group).slice(0, begin, end), q[n][h]) * scale;
        if (bias) scores = scores + bias->forward(end - begin, end - begin)[h][n - offsets[b]];
        heads.push_back(at::mv(v.select(1, h / group).slice(0, begin, end).t(), at::softmax(scores, 0)));
      }
      rows.push_back(at::stack(heads));
    }
  }
  return at::stack(rows);
}

TEST(RaggedAttention, KeysOfAnotherTextAndNoRowsOfOne) {
  const std::vector<int64_t> queries{0, 3, 3, 4}, keys{0, 2, 4, 7};  // the second sequence has no row
  const AttentionOptions options{.scale = 0.4, .causal = false};
  expect_gradients_match([&](const auto& in) { return ragged_attention(in[0], in[1], in[2], queries, keys, options); },
                         {leaf(torch::randn({4, 4, 3})), leaf(torch::randn({7, 2, 3})), leaf(torch::randn({7, 2, 3}))});
  const auto q = torch::randn({4, 4, 3}), k = torch::randn({7, 2, 3}), v = torch::randn({7, 2, 3});
  EXPECT_LT(relative_error(ragged_attention(q, k, v, queries, keys, options),
                           seen_whole(q, k, v, queries, keys, options.scale, nullptr)),
            1e-6);
}

TEST(RaggedAttention, ABiasThatIsFrozenAndOneThatLearns) {
  const std::vector<int64_t> offsets{0, 5, 6, 13};
  for (const int64_t heads : {4, 2}) {  // two query heads share a key, or each has its own
    RelativeBias bias(8, 6, heads, /*both_ways=*/true, torch::kFloat64);
    bias->weight.normal_();
    const AttentionOptions options{.scale = 0.4, .causal = false, .bias = bias};
    const std::vector<torch::Tensor> inputs{leaf(torch::randn({13, heads, 3})), leaf(torch::randn({13, 2, 3})),
                                            leaf(torch::randn({13, 2, 3}))};
    auto attend = [&](const auto& in) { return ragged_attention(in[0], in[1], in[2], offsets, options); };
    expect_gradients_match(attend, inputs);
    const auto frozen = attend(inputs);
    EXPECT_LT(relative_error(frozen, seen_whole(inputs[0], inputs[1], inputs[2], offsets, offsets, 0.4, bias)), 1e-12);
    frozen.square().sum().backward();
    const torch::Tensor of_queries = inputs[0].grad().clone();
    inputs[0].mutable_grad() = torch::Tensor();

    bias->weight.requires_grad_(true);
    const auto learning = attend(inputs);
    EXPECT_LT(relative_error(learning, frozen), 1e-12);
    learning.square().sum().backward();
    EXPECT_LT(relative_error(inputs[0].grad(), of_queries), 1e-12);
    const torch::Tensor of_bias = bias->weight.grad().clone();
    bias->weight.mutable_grad() = torch::Tensor();
    seen_whole(inputs[0], inputs[1], inputs[2], offsets, offsets, 0.4, bias).square().sum().backward();
    EXPECT_LT(relative_error(of_bias, bias->weight.grad()), 1e-12);
  }
}

}  // namespace
}  // namespace moesaic::nn
