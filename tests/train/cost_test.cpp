#include "moesaic/train/cost.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/train/tiny_run.h"

namespace moesaic::train {
namespace {

TEST(Cost, CountsEveryProductOfAStep) {
  const auto model = tiny_model();
  adapters::AdapterConfig config;
  config.method = "lora";
  config.lora_rank = 1;
  config.targets = std::vector<std::string>{"q_proj"};
  const auto adapter = adapters::Adapter::create(config, model->sites(), torch::kCPU, 1);
  model->attach("lora", adapter);
  // Two examples of 5 prompt and 3 answer tokens. A layer's linears have 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
  // numbers.
  const double linears = 3 * 1920, rows = 16, sees = 4, head = 53 * 16, trained = 3 * 32;
  const double attention = 3 * 4 * rows * sees * 16;
  const Cost cost = micro_batch_cost(*model, *adapter, {2, 10, 6, 6}, /*checkpointing=*/false);
  EXPECT_EQ(cost.operations, 2 * (2 * rows * linears) + 3 * attention + 2 * (2 * 6 * head) + 6 * rows * trained);
  EXPECT_EQ(cost.bytes, 2 * 4 * (linears + head));
  const Cost again = micro_batch_cost(*model, *adapter, {2, 10, 6, 6}, /*checkpointing=*/true);
  EXPECT_EQ(again.operations - cost.operations, 2 * rows * linears + attention + 2 * 6 * head);
}

TEST(Cost, TimeIsOfTheSlowerOfProductsAndMemory) {
  const Accelerator& h100 = accelerator("h100");
  EXPECT_DOUBLE_EQ((Cost{989e12 * kUtilisation, 0}).seconds(h100, torch::kBFloat16), 1);
  EXPECT_DOUBLE_EQ((Cost{67e12 * kUtilisation, 0}).seconds(h100, torch::kFloat32), 1);
  EXPECT_DOUBLE_EQ((Cost{1, 3350e9 * kBandwidthShare * 2}).seconds(h100, torch::kBFloat16), 2);
  EXPECT_THAT([] { accelerator("h1000"); }, testing::ThrowsMessage<UsageError>(testing::AllOf(
                                                testing::HasSubstr("h1000"), testing::HasSubstr("h100"))));
}

}  // namespace
}  // namespace moesaic::train
