#include "moesaic/train/cost.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "moesaic/models/registry.h"
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

TEST(Cost, AnExpertHasItsShareOfTheRows) {
  const Json dense{{"model_type", "llama"},   {"vocab_size", 53},       {"hidden_size", 16},
                   {"intermediate_size", 24}, {"num_hidden_layers", 2}, {"num_attention_heads", 4},
                   {"num_key_value_heads", 2}};
  Json sparse = dense;
  sparse.update({{"model_type", "mixtral"}, {"num_local_experts", 8}, {"num_experts_per_tok", 2}});
  auto operations = [](const Json& json) {
    auto model = std::make_shared<models::CausalLM>(models::parse_decoder_config(json, "test"), torch::kFloat32);
    adapters::AdapterConfig config;
    config.method = "lora";
    config.lora_rank = 1;
    config = adapters::resolve_targets(config, "all-linear", model->sites());
    const auto adapter = adapters::Adapter::create(config, model->sites(), torch::kCPU, 1);
    model->attach("lora", adapter);
    return micro_batch_cost(*model, *adapter, {2, 10, 6, 6}, /*checkpointing=*/false).operations;
  };
  // Two of eight for each token: one feed-forward network more, with its adapter.
  const double rows = 16, network = 2 * (3 * 16 * 24), adapter = 2 * 3 * (16 + 24);
  EXPECT_EQ(operations(sparse) - operations(dense), 2 * (2 * rows * network) + 6 * rows * adapter);
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
