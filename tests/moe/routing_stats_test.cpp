#include "moesaic/moe/routing_stats.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "moesaic/base/check.h"

namespace moesaic::moe {
namespace {

nn::RoutingRecord record(const std::string& site, torch::Tensor probs, int64_t layer = 3,
                         const std::string& owner = "a4") {
  return {owner, site, layer, true, probs.log(), probs, probs, 1};
}

TEST(RoutingStats, SumsOverPasses) {
  RoutingStats stats;
  EXPECT_TRUE(stats.empty());
  stats.add({record("a", torch::tensor({{0.75f, 0.25f}, {0.5f, 0.5f}}))});
  stats.add({record("a", torch::tensor({{0.25f, 0.75f}})), record("b", torch::tensor({{1.0f, 0.0f}}))});
  const SiteRouting& a = stats.owners().at("a4").at("a");
  EXPECT_EQ(a.layer, 3);
  EXPECT_EQ(a.rows, 3);
  EXPECT_DOUBLE_EQ(a.mean_prob(0), 0.5);
  EXPECT_EQ(a.top1, (std::vector<int64_t>{2, 1}));  // the tie of row 1 goes to the first expert
  EXPECT_EQ(stats.owners().at("a4").at("b").top1, (std::vector<int64_t>{1, 0}));
  // rows (3/4, 1/4) twice and (1/2, 1/2): entropies h, ln 2, h
  const double h = -(0.75 * std::log(0.75) + 0.25 * std::log(0.25));
  EXPECT_NEAR(a.entropy(), (2 * h + std::log(2.0)) / 3, 1e-6);
  EXPECT_EQ(stats.owners().at("a4").at("b").entropy(), 0);  // 0 ln 0 = 0

  const OrderedJson site = stats.json()["a4"]["a"];
  // variance of 0.75, 0.5, 0.25: 1/24
  EXPECT_NEAR(site["prob_std"][0].get<double>(), std::sqrt(1.0 / 24.0), 1e-6);
  EXPECT_NEAR(site["max_load"].get<double>(), 0.5, 1e-6);
  EXPECT_NEAR(site["entropy_share"].get<double>(), a.entropy() / std::log(2.0), 1e-6);
}

TEST(RoutingStats, WhatTopKKeeps) {
  // Of four experts two a row: {0, 1} three times, {0, 2} once; the fourth never.
  auto row = [](int64_t other) {
    torch::Tensor weights = torch::zeros({1, 4});
    weights[0][0] = weights[0][other] = 0.5;
    return weights;
  };
  const torch::Tensor weights = torch::cat({row(1), row(1), row(1), row(2)}), probs = torch::full({4, 4}, 0.25);
  RoutingStats stats;
  stats.add({{"base", "gate", 0, false, probs.log(), probs, weights.narrow(0, 0, 3), 1}});
  stats.add({{"base", "gate", 0, false, probs.log(), probs, weights.narrow(0, 3, 1), 1}});
  const OrderedJson site = stats.json()["base"]["gate"];
  EXPECT_EQ(site["kept_share"], OrderedJson({0.5, 0.375, 0.125, 0.0}));
  EXPECT_EQ(site["dead"], OrderedJson({3}));
  EXPECT_EQ(site["partner"], OrderedJson({1, 0, 0, -1}));
  EXPECT_EQ(site["partner_share"], OrderedJson({0.75, 1.0, 1.0, 0.0}));
  // Soft merging keeps all.
  stats = {};
  stats.add({record("a", probs)});
  EXPECT_FALSE(stats.json()["a4"]["a"].contains("dead"));
}

TEST(RoutingStats, SumsOfPartsAreThoseOfTheWhole) {
  torch::manual_seed(3);
  auto made = [] {
    nn::RoutingRecord one = record("q_proj", torch::softmax(torch::randn({5, 4}), 1));
    one.weights = torch::where(one.probs > 0.2, one.probs, torch::zeros_like(one.probs));
    return one;
  };
  const std::vector<nn::RoutingRecord> records{made(), made()};
  RoutingStats whole, merged;
  whole.add(records);
  for (const nn::RoutingRecord& each : records) {
    RoutingStats part;
    part.add(std::vector<nn::RoutingRecord>{each});
    merged.add(Json::parse(part.sums().dump()));
  }
  EXPECT_EQ(merged.json(), whole.json());
  EXPECT_FALSE(whole.owners().at("a4").at("q_proj").kept.empty());
}

TEST(RoutingStats, OwnersAreKeptApart) {
  RoutingStats stats;
  stats.add(
      {record("a", torch::tensor({{0.75f, 0.25f}})), record("a", torch::tensor({{0.1f, 0.2f, 0.3f, 0.4f}}), 3, "a8")});
  EXPECT_EQ(stats.owners().at("a4").at("a").experts(), 2);
  EXPECT_EQ(stats.owners().at("a8").at("a").experts(), 4);
  EXPECT_THROW(stats.add({record("a", torch::tensor({{0.1f, 0.2f, 0.7f}}))}), DataError);
}

TEST(RoutingStats, SummaryOfUniformAndCollapsed) {
  RoutingStats stats;
  stats.add({record("a", torch::full({3, 4}, 0.25f), 0), record("b", torch::tensor({{1.0f, 0.0f}, {1.0f, 0.0f}}), 2)});
  const Json summary = stats.summary();
  // Site a: entropy 1, loads 1/4 each: cv 0. Site b: entropy 0, loads (1, 0): mean 1/2, deviation 1/2, cv 1.
  EXPECT_NEAR(summary["layers"][0]["entropy_share"].get<double>(), 1.0, 1e-6);
  EXPECT_NEAR(summary["layers"][0]["load_cv"].get<double>(), 0.0, 1e-6);
  EXPECT_NEAR(summary["layers"][0]["max_load"].get<double>(), 0.25, 1e-6);
  EXPECT_EQ(summary["layers"][1]["layer"], 2);
  EXPECT_NEAR(summary["layers"][1]["entropy_share"].get<double>(), 0.0, 1e-6);
  EXPECT_NEAR(summary["layers"][1]["load_cv"].get<double>(), 1.0, 1e-6);
  EXPECT_NEAR(summary["entropy_share"].get<double>(), 0.5, 1e-6);
  EXPECT_NEAR(summary["load_cv"].get<double>(), 0.5, 1e-6);
  EXPECT_EQ(stats.largest_load(), (std::pair<double, std::string>{1.0, "a4 b"}));
}

TEST(RoutingStats, SummaryKeepsTheLayersOfOwnersApart) {
  RoutingStats stats;
  stats.add({record("a", torch::tensor({{1.0f, 0.0f}}), 0, "anchor"),
             record("a", torch::full({1, 4}, 0.25f), 0, "augmenting.0")});
  const Json layers = stats.summary()["layers"];
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0]["owner"], "anchor");
  EXPECT_EQ(layers[0]["max_load"], 1.0);
  EXPECT_EQ(layers[1]["owner"], "augmenting.0");
  EXPECT_EQ(layers[1]["max_load"], 0.25);
  for (const Json& row : layers) EXPECT_EQ(row["layer"], 0);
}

TEST(RoutingStats, MicroBatchesAddUpByRows) {
  RoutingStats stats;
  stats.add({record("a", torch::tensor({{0.9f, 0.1f}}))});
  stats.add({record("a", torch::tensor({{0.1f, 0.9f}, {0.4f, 0.6f}, {0.2f, 0.8f}}))});
  // Loads: 0.9 + 0.1 + 0.4 + 0.2 = 1.6 of 4 and 2.4 of 4.
  EXPECT_NEAR(stats.summary()["max_load"].get<double>(), 0.6, 1e-6);
}

TEST(RoutingSimilarity, CosineOfMeanProbabilitiesOverCommonRouters) {
  RoutingStats x, y;
  x.add({record("a", torch::tensor({{1.0f, 0.0f}})), record("b", torch::tensor({{0.5f, 0.5f}}))});
  y.add({record("a", torch::tensor({{0.0f, 1.0f}})), record("b", torch::tensor({{0.5f, 0.5f}})),
         record("c", torch::tensor({{0.9f, 0.1f}}))});
  // (1, 0, .5, .5) . (0, 1, .5, .5) = 0.5; both norms sqrt(1.5)
  EXPECT_NEAR(routing_similarity(x, y), 0.5 / 1.5, 1e-6);
  EXPECT_NEAR(routing_similarity(x, x), 1, 1e-12);
  RoutingStats other;
  other.add({record("a", torch::tensor({{1.0f, 0.0f}}), 3, "a8")});
  EXPECT_EQ(routing_similarity(x, other), 0) << "no common router";
}

TEST(TaskInformation, IsTheMeanDivergenceOfTasksFromTheirMean) {
  auto task = [](const std::vector<float>& probs) {
    RoutingStats stats;
    stats.add({record("a", torch::tensor(probs).unsqueeze(0)), record("b", torch::tensor({{0.5f, 0.5f}}))});
    return stats;
  };
  EXPECT_NEAR(task_information({task({0.3f, 0.7f}), task({0.3f, 0.7f})}), 0, 1e-7);
  // Router a tells the two tasks apart wholly, router b not at all.
  EXPECT_NEAR(task_information({task({1, 0}), task({0, 1})}), 0.5, 1e-6);
  // p = (3/4, 1/4), (1/4, 3/4) about (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2), over ln 2.
  const double divergence = 0.75 * std::log(1.5) + 0.25 * std::log(0.5);
  EXPECT_NEAR(task_information({task({0.75f, 0.25f}), task({0.25f, 0.75f})}), divergence / std::log(2.0) / 2, 1e-6);
  EXPECT_TRUE(std::isnan(task_information({task({1, 0})})));
  RoutingStats other;
  other.add({record("c", torch::tensor({{1.0f, 0.0f}}))});
  EXPECT_TRUE(std::isnan(task_information({task({1, 0}), other})));
}

}  // namespace
}  // namespace moesaic::moe
