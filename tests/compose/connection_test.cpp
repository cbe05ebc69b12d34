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

/// The definition, row by row: softmax over the keys that the row sees of its own sequence's.
torch::Tensor by_definition(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                            const std::vector<int64_t>& key_offsets, const Visibility& seen,
                            const torch::Tensor& slopes = {}) {
  std::vector<torch::Tensor> rows;
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  for (size_t b = 0; b + 1 < key_offsets.size(); ++b) {
    for (int64_t n = seen.query_offsets[b]; n < seen.query_offsets[b + 1]; ++n) {
      std::vector<int64_t> keys(seen.visible[n]);
      std::iota(keys.begin(), keys.end(), 0);
      if (!seen.aside.empty()) {
        for (int64_t s = seen.aside[n].first; s < seen.aside[n].second; ++s) keys.push_back(s);
      }
      if (keys.empty()) {
        rows.push_back(torch::zeros_like(q[n]));
        continue;
      }
      const auto chosen = torch::tensor(keys) + key_offsets[b];
      auto scores = at::einsum("hk,shk->hs", {q[n], k.index_select(0, chosen)}) * scale;
      if (slopes.defined()) {
        std::vector<double> apart;
        for (const int64_t s : keys) {
          apart.push_back(static_cast<double>(std::abs(seen.query_places[n] - seen.key_places[b][s])));
        }
        scores = scores - slopes.unsqueeze(1) * torch::tensor(apart, torch::kFloat64);
      }
      rows.push_back(at::einsum("hs,shk->hk", {at::softmax(scores, 1), v.index_select(0, chosen)}));
    }
  }
  return at::stack(rows);
}

const std::vector<int64_t> kKeyOffsets{0, 4, 4, 9};  // the second sequence has no key at all
const Visibility kSeen{{0, 5, 7, 11},
                       {0, 0, 1, 3, 4, /**/ 0, 0, /**/ 2, 2, 5, 5},
                       {0, 1, 2, 3, 4, /**/ 0, 1, /**/ 6, 7, 8, 9},
                       {{1, 3, 3, 4}, {}, {2, 2, 8, 8, 8}}};

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

TEST(PrefixAttention, SlopesWeighByDistance) {
  torch::manual_seed(1);
  const auto q = leaf(torch::randn({11, 2, 3})), k = leaf(torch::randn({9, 2, 3})), v = leaf(torch::randn({9, 2, 3}));
  const auto slopes = leaf(torch::tensor({0.5, -0.1}));
  auto ours = [&](const std::vector<torch::Tensor>& x) {
    return prefix_attention(x[0], {x[1], x[2], kKeyOffsets, {}}, kSeen, x[3]);
  };
  EXPECT_LT(relative_error(ours({q, k, v, slopes}), by_definition(q, k, v, kKeyOffsets, kSeen, slopes)), 1e-12);
  expect_gradients_match(ours, {q, k, v, slopes});
}

/// Keys behind those of the text, each of one query alone.
Visibility seen_aside() {
  Visibility seen = kSeen;
  seen.visible = {0, 0, 1, 2, 3, /**/ 0, 0, /**/ 2, 2, 3, 3};
  seen.aside = {{3, 3}, {3, 4}, {4, 4}, {4, 4}, {4, 4}, /**/ {0, 0}, {0, 0}, /**/ {3, 3}, {3, 5}, {5, 5}, {5, 5}};
  return seen;
}

TEST(PrefixAttention, KeysAsideAreSeenByTheirQueryAlone) {
  torch::manual_seed(1);
  const auto q = leaf(torch::randn({11, 2, 3})), k = leaf(torch::randn({9, 2, 3})), v = leaf(torch::randn({9, 2, 3}));
  const auto slopes = leaf(torch::tensor({0.5, -0.1}));
  for (const torch::Tensor& of_heads : {torch::Tensor(), slopes}) {
    auto ours = [&](const std::vector<torch::Tensor>& x) {
      return prefix_attention(x[0], {x[1], x[2], kKeyOffsets, {}}, seen_aside(), of_heads);
    };
    EXPECT_LT(relative_error(ours({q, k, v}), by_definition(q, k, v, kKeyOffsets, seen_aside(), of_heads)), 1e-12);
    if (of_heads.defined()) expect_gradients_match(ours, {q, k, v});
  }
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
    for (const char* norm : {"none", "pre", "standard", "post"}) {
      // With norm `standard` also everything else that the paper has not.
      const bool standard = std::string(norm) == "standard";
      ConnectionConfig config{.num_heads = 2,
                              .cross_position = standard ? "recency" : "none",
                              .norm = norm,
                              .output_scale = standard ? 0.3 : 0.0,
                              .attention_bias = biases};
      Connection connection(config, /*newest=*/false, 3, 4, torch::TensorOptions(torch::kFloat32));
      torch::NoGradGuard no_grad;
      for (auto& parameter : connection->parameters()) parameter.normal_(0, 0.7);
      if (standard) {
        for (auto& buffer : connection->buffers()) buffer.uniform_(0.5, 2);
      }
      auto parameter = [&](const std::string& name) { return connection->named_parameters()[name]; };
      auto linear = [&](const std::string& name, const torch::Tensor& x) {
        torch::Tensor y = at::matmul(x, parameter(name + ".weight").t());
        return biases || name == "proj" ? y + parameter(name + ".bias") : y;
      };
      const auto states = torch::randn({2, 3}), h = torch::randn({1, 4});
      // Rows at unit root mean square.
      auto scaled = [&](const torch::Tensor& x) {
        return norm == std::string("pre") || standard ? x / (x.pow(2).mean(1, /*keepdim=*/true) + 1e-6).sqrt() : x;
      };
      auto buffer = [&](const char* name) { return connection->named_buffers()[name]; };
      const auto read = standard ? (states - buffer("input_mean")) / buffer("input_deviation") : scaled(states);
      const auto p = linear("proj", read), q = linear("q_proj", scaled(h));
      const auto k = linear("k_proj", p), v = linear("v_proj", p);
      std::vector<torch::Tensor> heads;
      for (int64_t head : {0, 1}) {
        auto part = [&](const torch::Tensor& x) { return x.slice(1, 2 * head, 2 * head + 2); };
        auto scores = at::matmul(part(q), part(k).t()) / std::sqrt(2.0);
        if (standard) scores = scores - parameter("slopes")[head] * torch::tensor({{6.0F, 2.0F}});
        heads.push_back(at::matmul(at::softmax(scores, 1), part(v)));
      }
      torch::Tensor expected = linear("o_proj", at::cat(heads, 1));
      if (std::string(norm) == "post") {
        expected = expected / (expected.pow(2).mean() + 1e-6).sqrt() * (1 + parameter("norm.weight"));
      }
      if (standard) expected = expected * 0.3 * h.pow(2).mean().sqrt();
      connection->eval();
      const auto [keys, values] = connection->keys_values(states, {});
      const auto y = connection->forward(h, {}, {keys, values, {0, 2}, {}}, {{0, 1}, {2}, {7}, {{1, 5}}});
      EXPECT_LT(relative_error(y, expected), 1e-6) << norm << biases;
    }
  }
}

TEST(Connection, TheNewestStateAlone) {
  torch::manual_seed(4);
  Connection connection(ConnectionConfig{.num_heads = 2, .norm = "none", .output_scale = 1.0}, /*newest=*/true, 3, 4,
                        torch::TensorOptions(torch::kFloat64));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : connection->parameters()) parameter.normal_();
  }
  const auto parameters = connection->named_parameters();
  ASSERT_EQ(parameters.size(), 2u);
  std::vector<torch::Tensor> inputs{leaf(torch::randn({11, 4})), leaf(torch::randn({9, 3}))};
  for (const auto& parameter : connection->parameters()) inputs.push_back(parameter);
  Visibility seen = kSeen;
  auto ours = [&](const std::vector<torch::Tensor>& x) {
    const auto [k, v] = connection->keys_values(x[1], {});
    return connection->forward(x[0], {}, {k, v, kKeyOffsets, {}}, seen);
  };
  const auto y = ours(inputs), &h = inputs[0];
  const auto p = at::matmul(inputs[1], parameters["proj.weight"].t()) + parameters["proj.bias"];
  for (size_t b = 0; b < 3; ++b) {
    for (int64_t n = kSeen.query_offsets[b]; n < kSeen.query_offsets[b + 1]; ++n) {
      const int64_t seen = kSeen.visible[n];
      const auto expected =
          seen == 0 ? torch::zeros_like(h[n]) : p[kKeyOffsets[b] + seen - 1] * h[n].pow(2).mean().sqrt();
      EXPECT_LE((y[n] - expected).abs().max().item<double>(), seen == 0 ? 0.0 : 1e-12) << n;
    }
  }
  expect_gradients_match(ours, inputs, 1e-6);
  const auto [k, v] = connection->keys_values(inputs[1], {});
  const auto weights = connection->attention_weights(h, {}, {k, v, kKeyOffsets, {}}, kSeen);
  EXPECT_EQ(weights[2][1][0][1].item<float>(), 1.0F) << "of the two that it sees";
  EXPECT_EQ(weights[2].sum().item<float>(), 2.0F * 4);
  seen = seen_aside();
  const auto aside = ours(inputs);
  EXPECT_LT(relative_error(aside[1], p[3] * h[1].pow(2).mean().sqrt()), 1e-12);
  EXPECT_LT(relative_error(aside[8], p[8] * h[8].pow(2).mean().sqrt()), 1e-12);
  EXPECT_EQ(aside[0].abs().sum().item<double>(), 0.0);
}

TEST(Connection, DimensionsAreStandardisedByTheFirstBatchThatIsTrained) {
  torch::manual_seed(4);
  Connection connection(ConnectionConfig{.num_heads = 1, .norm = "standard"}, /*newest=*/true, 3, 4,
                        torch::TensorOptions(torch::kFloat64));
  torch::NoGradGuard no_grad;
  connection->named_parameters()["proj.weight"].copy_(torch::eye(4, 3));
  connection->named_parameters()["proj.bias"].zero_();
  const auto first = torch::randn({50, 3}, torch::kFloat64) * torch::tensor({1.0, 100.0, 0.0}) + 7,
             second = torch::randn({50, 3}, torch::kFloat64);
  auto read = [&](const torch::Tensor& states) { return connection->keys_values(states, {}).first.view({-1, 4}); };
  connection->eval();
  EXPECT_TRUE(read(first).isfinite().all().item<bool>()) << "before it is trained";
  connection->train();
  const auto y = read(first);
  EXPECT_LT(y.mean(0).abs().max().item<double>(), 1e-12);
  EXPECT_LT(relative_error(y.slice(1, 0, 2).std(0), torch::ones(2, torch::kFloat64)), 1e-12);
  EXPECT_TRUE(y.isfinite().all().item<bool>()) << "a dimension that never changes";
  const auto other = read(second);
  connection->eval();
  EXPECT_TRUE(torch::equal(read(second), other)) << "by the first one for good";
}

TEST(Connection, RowsThatSeeNothingGetExactlyNothing) {
  torch::manual_seed(5);
  Connection connection(
      ConnectionConfig{
          .num_heads = 2, .cross_position = "none", .norm = "post", .attention_bias = true, .output_init = "normal"},
      /*newest=*/false, 3, 4, torch::TensorOptions(torch::kFloat32));
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
  for (const char* position : {"rope", "recency"}) {
    const nn::Rope rope(nn::RopeConfig{}, 4);
    Connection connection(
        ConnectionConfig{.num_heads = 2, .cross_position = position, .norm = "none", .attention_bias = true},
        /*newest=*/false, 3, 8, torch::TensorOptions(torch::kFloat64));
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
}

TEST(Connection, GradientsOfEveryParameter) {
  for (const char* position : {"rope", "none", "recency"}) {
    Connection connection(
        ConnectionConfig{.num_heads = 2, .cross_position = position, .norm = "none", .attention_bias = true},
        /*newest=*/false, 3, 8, torch::TensorOptions(torch::kFloat64));
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
      return connection->forward(x[0], query_rope, {k, v, {0, 5}, {}},
                                 {{0, 4}, {1, 3, 4, 5}, {0, 1, 2, 3}, {{0, 1, 1, 2, 3}}});
    };
    expect_gradients_match(output, inputs, 1e-6);
  }
}

TEST(Connection, StartsAtZeroWithEverythingElseAlive) {
  Connection connection(ConnectionConfig{.num_heads = 4}, /*newest=*/false, 64, 64,
                        torch::TensorOptions(torch::kFloat32));
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
