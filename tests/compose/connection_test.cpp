#include "moesaic/compose/connection.h"

#include <gtest/gtest.h>

#include "moesaic/base/seed.h"
#include "moesaic/nn/rope.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::compose {
namespace {

using test::expect_gradients_match;
using test::leaf;
using test::relative_error;

/// The definition, row by row: softmax over the first c(n) keys of the row's own sequence.
torch::Tensor by_definition(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                            const std::vector<int64_t>& key_offsets, const Visibility& seen) {
  std::vector<torch::Tensor> rows;
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  for (size_t b = 0; b + 1 < key_offsets.size(); ++b) {
    for (int64_t n = seen.query_offsets[b]; n < seen.query_offsets[b + 1]; ++n) {
      const int64_t first = key_offsets[b], last = first + seen.visible[n];
      if (last == first) {
        rows.push_back(torch::zeros_like(q[n]));
        continue;
      }
      const auto scores = at::einsum("hk,shk->hs", {q[n], k.slice(0, first, last)}) * scale;
      rows.push_back(at::einsum("hs,shk->hk", {at::softmax(scores, 1), v.slice(0, first, last)}));
    }
  }
  return at::stack(rows);
}

const std::vector<int64_t> kKeyOffsets{0, 4, 4, 9};  // the second sequence has no key at all
const Visibility kSeen{{0, 5, 7, 11}, {0, 0, 1, 3, 4, /**/ 0, 0, /**/ 2, 2, 5, 5}};

TEST(PrefixAttention, EqualsItsDefinitionWithGradients) {
  torch::manual_seed(1);
  const auto q = leaf(torch::randn({11, 2, 3})), k = leaf(torch::randn({9, 2, 3})), v = leaf(torch::randn({9, 2, 3}));
  auto ours = [&](const std::vector<torch::Tensor>& x) {
    return prefix_attention(x[0], {x[1], x[2], kKeyOffsets, {}}, kSeen);
  };
  EXPECT_LT(relative_error(ours({q, k, v}), by_definition(q, k, v, kKeyOffsets, kSeen)), 1e-12);
  expect_gradients_match(ours, {q, k, v});
  for (int64_t row : {0, 1, 5, 6}) EXPECT_EQ(ours({q, k, v})[row].abs().max().item<double>(), 0.0) << row;
}

TEST(PrefixAttention, SquareIsCausalAttention) {
  torch::manual_seed(2);
  const std::vector<int64_t> offsets{0, 3, 7};
  const Visibility seen{offsets, {1, 2, 3, /**/ 1, 2, 3, 4}};
  const auto q = leaf(torch::randn({7, 2, 4})), k = leaf(torch::randn({7, 2, 4})), v = leaf(torch::randn({7, 2, 4}));
  auto ours = [&](const std::vector<torch::Tensor>& x) {
    return prefix_attention(x[0], {x[1], x[2], offsets, {}}, seen);
  };
  EXPECT_LT(relative_error(ours({q, k, v}), by_definition(q, k, v, offsets, seen)), 1e-12);
  expect_gradients_match(ours, {q, k, v});
}

TEST(PrefixAttention, KeysThatNobodySeesChangeNothing) {
  torch::manual_seed(3);
  const auto q = torch::randn({3, 1, 2}), k = torch::randn({5, 1, 2}), v = torch::randn({5, 1, 2});
  const Visibility seen{{0, 3}, {1, 2, 2}};
  const auto all = prefix_attention(q, {k, v, {0, 5}, {}}, seen);
  const auto two = prefix_attention(q, {k.slice(0, 0, 2), v.slice(0, 0, 2), {0, 2}, {}}, seen);
  EXPECT_TRUE(torch::equal(all, two));
  EXPECT_TRUE(torch::equal(all, prefix_attention(q, {{}, {}, {}, {{k, v}}}, seen))) << "from a cache";
}

TEST(Connection, EqualsTheFormulaOfThePaper) {
  // D_A = 3, D_B = 4, two heads of width 2. One query sees two augmenting states.
  torch::manual_seed(4);
  for (const bool biases : {false, true}) {
    for (const char* norm : {"none", "pre", "post"}) {
      ConnectionConfig config{.num_heads = 2, .cross_position = "none", .norm = norm, .attention_bias = biases};
      Connection connection(config, 3, 4, torch::TensorOptions(torch::kFloat32));
      torch::NoGradGuard no_grad;
      for (auto& parameter : connection->parameters()) parameter.normal_(0, 0.7);
      auto parameter = [&](const std::string& name) { return connection->named_parameters()[name]; };
      auto linear = [&](const std::string& name, const torch::Tensor& x) {
        torch::Tensor y = at::matmul(x, parameter(name + ".weight").t());
        return biases || name == "proj" ? y + parameter(name + ".bias") : y;
      };
      const auto states = torch::randn({2, 3}), h = torch::randn({1, 4});
      // Rows at unit root mean square.
      auto scaled = [&](const torch::Tensor& x) {
        return std::string(norm) == "pre" ? x / (x.pow(2).mean(1, /*keepdim=*/true) + 1e-6).sqrt() : x;
      };
      const auto p = linear("proj", scaled(states)), q = linear("q_proj", scaled(h));
      const auto k = linear("k_proj", p), v = linear("v_proj", p);
      std::vector<torch::Tensor> heads;
      for (int64_t head : {0, 1}) {
        auto part = [&](const torch::Tensor& x) { return x.slice(1, 2 * head, 2 * head + 2); };
        heads.push_back(at::matmul(at::softmax(at::matmul(part(q), part(k).t()) / std::sqrt(2.0), 1), part(v)));
      }
      torch::Tensor expected = linear("o_proj", at::cat(heads, 1));
      if (std::string(norm) == "post") {
        expected = expected / (expected.pow(2).mean() + 1e-6).sqrt() * (1 + parameter("norm.weight"));
      }
      const auto [keys, values] = connection->keys_values(states, {});
      const auto y = connection->forward(h, {}, {keys, values, {0, 2}, {}}, {{0, 1}, {2}});
      EXPECT_LT(relative_error(y, expected), 1e-6) << norm << biases;
    }
  }
}

TEST(Connection, RowsThatSeeNothingGetExactlyNothing) {
  torch::manual_seed(5);
  Connection connection(
      ConnectionConfig{
          .num_heads = 2, .cross_position = "none", .norm = "post", .attention_bias = true, .output_init = "normal"},
      3, 4, torch::TensorOptions(torch::kFloat32));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : connection->parameters()) parameter.normal_();
  }
  const auto [keys, values] = connection->keys_values(torch::randn({2, 3}), {});
  const auto y = connection->forward(torch::randn({3, 4}), {}, {keys, values, {0, 2}, {}}, {{0, 3}, {0, 1, 2}});
  EXPECT_EQ(y[0].abs().max().item<float>(), 0.0f) << "biases do not pass";
  EXPECT_GT(y[1].abs().max().item<float>(), 0.0f);
  y.sum().backward();
  for (const auto& item : connection->named_parameters()) {
    EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>()) << item.key();
  }
}

TEST(Connection, AttentionWeightsAreWhatForwardMixesBy) {
  const nn::Rope rope(nn::RopeConfig{}, 4);
  Connection connection(
      ConnectionConfig{.num_heads = 2, .cross_position = "rope", .norm = "none", .attention_bias = true}, 3, 8,
      torch::TensorOptions(torch::kFloat64));
  torch::manual_seed(7);
  torch::NoGradGuard no_grad;
  for (auto& parameter : connection->parameters()) parameter.normal_(0, 0.8);
  auto parameters = connection->named_parameters();
  const auto h = torch::randn({11, 8}, torch::kFloat64), states = torch::randn({9, 3}, torch::kFloat64);
  const auto tables = rope.tables(torch::arange(11), {}, {}), key_tables = rope.tables(torch::arange(9), {}, {});
  const auto [k, v] = connection->keys_values(states, key_tables);
  const KeysValues keys_values{k, v, kKeyOffsets, {}};
  const auto weights = connection->attention_weights(h, tables, keys_values, kSeen);
  const auto y = connection->forward(h, tables, keys_values, kSeen);
  ASSERT_EQ(weights.size(), 3u);
  for (size_t b = 0; b < 3; ++b) {
    const int64_t begin = kSeen.query_offsets[b], end = kSeen.query_offsets[b + 1];
    ASSERT_EQ(weights[b].sizes(), (std::vector<int64_t>{2, end - begin, kKeyOffsets[b + 1] - kKeyOffsets[b]}));
    const auto values = v.slice(0, kKeyOffsets[b], kKeyOffsets[b + 1]).transpose(0, 1);  // [H, S, k]
    const auto mixed = at::matmul(weights[b], values).transpose(0, 1).reshape({-1, 8});
    const auto expected = at::matmul(mixed, parameters["o_proj.weight"].t()) + parameters["o_proj.bias"];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t seen = kSeen.visible[n];
      EXPECT_EQ(weights[b].slice(2, seen).select(1, n - begin).abs().sum().item<double>(), 0.0) << n;
      if (seen == 0) continue;  // forward gives exactly nothing, without the bias
      EXPECT_NEAR(weights[b].select(1, n - begin).sum().item<double>(), 2.0, 1e-12) << "each head's sum to 1";
      EXPECT_LT(relative_error(y[n], expected[n - begin]), 1e-12) << n;
    }
  }
}

TEST(Connection, GradientsOfEveryParameter) {
  for (const char* position : {"rope", "none"}) {
    Connection connection(
        ConnectionConfig{.num_heads = 2, .cross_position = position, .norm = "none", .attention_bias = true}, 3, 8,
        torch::TensorOptions(torch::kFloat64));
    torch::manual_seed(6);
    std::vector<torch::Tensor> inputs{leaf(torch::randn({4, 8})), leaf(torch::randn({5, 3}))};
    for (auto& parameter : connection->parameters()) {
      torch::NoGradGuard no_grad;
      parameter.normal_(0, 0.5);
    }
    for (const auto& parameter : connection->parameters()) inputs.push_back(parameter);
    const nn::Rope rope(nn::RopeConfig{}, 4);
    const auto query_rope = rope.tables(torch::arange(4), {}, {});
    const auto key_rope = rope.tables(torch::tensor({0, 1, 1, 2, 3}), {}, {});
    auto output = [&](const std::vector<torch::Tensor>& x) {
      const auto [k, v] = connection->keys_values(x[1], key_rope);
      return connection->forward(x[0], query_rope, {k, v, {0, 5}, {}}, {{0, 4}, {1, 3, 4, 5}});
    };
    expect_gradients_match(output, inputs, 1e-6);
  }
}

TEST(Connection, StartsAtZeroWithEverythingElseAlive) {
  Connection connection(ConnectionConfig{.num_heads = 4}, 64, 64, torch::TensorOptions(torch::kFloat32));
  connection->initialize(make_generator(1));
  int64_t count = 0;
  for (const auto& item : connection->named_parameters()) {
    count += item.value().numel();
    const bool zero = item.key() == "o_proj.weight" || item.key() == "proj.bias";
    EXPECT_EQ(item.value().abs().max().item<float>() == 0.0f, zero) << item.key();
    if (!zero) EXPECT_NEAR(item.value().std().item<float>(), 1.0 / 8, 0.01) << item.key();  // 1/sqrt(64)
  }
  EXPECT_EQ(count, 64 * 64 + 64 + 4 * 64 * 64);  // D_A D_B + D_B + 4 D_B^2 = 20,544
}

}  // namespace
}  // namespace moesaic::compose
