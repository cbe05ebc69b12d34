#include "moesaic/eval/routing_stats.h"

#include <gtest/gtest.h>

#include <cmath>

namespace moesaic::eval {
namespace {

nn::RoutingRecord record(const std::string& site, torch::Tensor probs) {
  return {site, 3, probs.log(), probs, probs, 1};
}

TEST(RoutingStats, SumsOverPasses) {
  RoutingStats stats;
  stats.add({record("a", torch::tensor({{0.75f, 0.25f}, {0.5f, 0.5f}}))});
  stats.add({record("a", torch::tensor({{0.25f, 0.75f}})), record("b", torch::tensor({{1.0f, 0.0f}}))});
  const SiteRouting& a = stats.sites().at("a");
  EXPECT_EQ(a.layer, 3);
  EXPECT_EQ(a.rows, 3);
  EXPECT_DOUBLE_EQ(a.mean_prob(0), 0.5);
  EXPECT_EQ(a.top1, (std::vector<int64_t>{2, 1}));  // the tie of row 1 goes to the first expert
  EXPECT_EQ(stats.sites().at("b").top1, (std::vector<int64_t>{1, 0}));
  // rows (3/4, 1/4) twice and (1/2, 1/2): entropies h, ln 2, h
  const double h = -(0.75 * std::log(0.75) + 0.25 * std::log(0.25));
  EXPECT_NEAR(a.entropy(), (2 * h + std::log(2.0)) / 3, 1e-6);
  EXPECT_EQ(stats.sites().at("b").entropy(), 0);  // 0 ln 0 = 0

  const OrderedJson json = stats.json();
  // variance of 0.75, 0.5, 0.25: 1/24
  EXPECT_NEAR(json["a"]["prob_std"][0].get<double>(), std::sqrt(1.0 / 24.0), 1e-6);
  EXPECT_NEAR(json["a"]["max_share"].get<double>(), 2.0 / 3.0, 1e-9);
}

TEST(RoutingSimilarity, CosineOfMeanProbabilitiesOverAllSites) {
  RoutingStats x, y;
  x.add({record("a", torch::tensor({{1.0f, 0.0f}})), record("b", torch::tensor({{0.5f, 0.5f}}))});
  y.add({record("a", torch::tensor({{0.0f, 1.0f}})), record("b", torch::tensor({{0.5f, 0.5f}}))});
  // (1, 0, .5, .5) . (0, 1, .5, .5) = 0.5; both norms sqrt(1.5)
  EXPECT_NEAR(routing_similarity(x, y), 0.5 / 1.5, 1e-6);
  EXPECT_NEAR(routing_similarity(x, x), 1, 1e-12);
  RoutingStats sharp, flat;
  sharp.add({record("a", torch::tensor({{1.0f, 0.0f}}))});
  flat.add({record("a", torch::tensor({{0.5f, 0.5f}}))});
  EXPECT_NEAR(routing_similarity(sharp, flat), 0.5 / std::sqrt(0.5), 1e-6);  // norms 1 and sqrt(0.5)
}

TEST(RoutingSimilarity, OtherSitesAreRefused) {
  RoutingStats x, y;
  x.add({record("a", torch::tensor({{1.0f, 0.0f}}))});
  y.add({record("b", torch::tensor({{1.0f, 0.0f}}))});
  EXPECT_THROW(routing_similarity(x, y), DataError);
}

}  // namespace
}  // namespace moesaic::eval
