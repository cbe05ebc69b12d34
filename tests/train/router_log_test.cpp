#include "moesaic/train/router_log.h"

#include <gtest/gtest.h>

namespace moesaic::train {
namespace {

nn::RoutingRecord record(const std::string& site, int64_t layer, const torch::Tensor& probs) {
  return {site, layer, probs.log(), probs, probs, 1};
}

TEST(RouterLog, UniformAndCollapsed) {
  RouterLog log;
  EXPECT_TRUE(log.empty());
  log.add({record("a", 0, torch::full({3, 4}, 0.25f)), record("b", 2, torch::tensor({{1.0f, 0.0f}, {1.0f, 0.0f}}))});
  const Json summary = log.summary();
  // Site a: entropy 1, loads 1/4 each: cv 0. Site b: entropy 0, shares (1, 0): mean 1/2, deviation 1/2, cv 1.
  EXPECT_NEAR(summary["layers"][0]["entropy"].get<double>(), 1.0, 1e-6);
  EXPECT_NEAR(summary["layers"][0]["load_cv"].get<double>(), 0.0, 1e-6);
  EXPECT_NEAR(summary["layers"][0]["max_share"].get<double>(), 0.25, 1e-6);
  EXPECT_EQ(summary["layers"][1]["layer"], 2);
  EXPECT_NEAR(summary["layers"][1]["entropy"].get<double>(), 0.0, 1e-6);
  EXPECT_NEAR(summary["layers"][1]["load_cv"].get<double>(), 1.0, 1e-6);
  EXPECT_NEAR(summary["entropy"].get<double>(), 0.5, 1e-6);
  EXPECT_NEAR(summary["load_cv"].get<double>(), 0.5, 1e-6);
  EXPECT_EQ(log.largest_share(), (std::pair<double, std::string>{1.0, "b"}));
}

TEST(RouterLog, MicroBatchesAddUpByRows) {
  RouterLog log;
  log.add({record("a", 0, torch::tensor({{0.9f, 0.1f}}))});
  log.add({record("a", 0, torch::tensor({{0.1f, 0.9f}, {0.4f, 0.6f}, {0.2f, 0.8f}}))});
  // Loads: 0.9 + 0.1 + 0.4 + 0.2 = 1.6 of 4 and 2.4 of 4.
  EXPECT_NEAR(log.summary()["max_share"].get<double>(), 0.6, 1e-6);
}

}  // namespace
}  // namespace moesaic::train
