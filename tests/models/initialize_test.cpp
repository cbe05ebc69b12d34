#include "moesaic/models/initialize.h"

#include <gtest/gtest.h>

#include "moesaic/models/registry.h"
#include "tests/models/tiny_models.h"

namespace moesaic::models {
namespace {

Json wide_config() {
  return {{"model_type", "llama"},    {"vocab_size", 500},        {"hidden_size", 128},
          {"intermediate_size", 256}, {"num_hidden_layers", 2},   {"num_attention_heads", 4},
          {"attention_bias", true},   {"num_key_value_heads", 4}, {"tie_word_embeddings", false}};
}

std::shared_ptr<CausalLM> initialized(const Json& config, uint64_t seed, torch::Dtype dtype = torch::kFloat32) {
  auto model = std::make_shared<CausalLM>(parse_decoder_config(config, "config.json"), torch::dtype(dtype));
  for (auto& parameter : model->parameters()) parameter.detach().fill_(7.0);
  initialize(*model, seed);
  return model;
}

TEST(Initialize, DeviationsFollowTheFanInAndTheDepth) {
  // L = 2: o_proj and down_proj are divided by sqrt(4). At least 16,384 draws a matrix: their deviation is within
  // 4 / sqrt(2 * 16384) = 2.2 % of s.
  const std::map<std::string, double> wanted{
      {"model.embed_tokens.weight", 0.1},
      {"lm_head.weight", 0.02},
      {"model.layers.1.self_attn.q_proj.weight", 1 / std::sqrt(128.0)},
      {"model.layers.0.self_attn.o_proj.weight", 0.5 / std::sqrt(128.0)},
      {"model.layers.0.mlp.up_proj.weight", 1 / std::sqrt(128.0)},
      {"model.layers.1.mlp.down_proj.weight", 0.5 / std::sqrt(256.0)},
  };
  const auto model = initialized(wide_config(), 5);
  const auto parameters = model->named_parameters();
  for (const auto& [name, deviation] : wanted) {
    EXPECT_NEAR(parameters[name].std().item<double>() / deviation, 1.0, 0.022) << name;
    EXPECT_NEAR(parameters[name].mean().item<double>() / deviation, 0.0, 4 / std::sqrt(16384.0)) << name;
  }
  EXPECT_TRUE(at::equal(parameters["model.layers.0.self_attn.q_proj.bias"], torch::zeros(128)));
  EXPECT_TRUE(at::equal(parameters["model.layers.1.input_layernorm.weight"], torch::ones(128)));
}

TEST(Initialize, ATiedEmbeddingIsAHead) {
  Json config = wide_config();
  config["tie_word_embeddings"] = true;
  const auto model = initialized(config, 5);
  EXPECT_NEAR(model->head().weight().std().item<double>() / 0.02, 1.0, 0.022);
}

TEST(Initialize, EveryFamilyStartsWithNeutralNormsAndFiniteLogits) {
  for (const auto& [name, config] : test::tiny_configs()) {
    const auto model = initialized(config, 1);
    const double neutral = model->config().norm_plus_one ? 0.0 : 1.0;
    for (const auto& item : model->named_parameters()) {
      if (item.key().find("norm") == std::string::npos) continue;
      EXPECT_TRUE(at::equal(item.value(), torch::full_like(item.value(), neutral))) << name << " " << item.key();
    }
    EXPECT_TRUE(test::logits_of(*model, {{1, 2, 3}}).isfinite().all().item<bool>()) << name;
  }
}

TEST(Initialize, FollowsFromTheSeed) {
  auto weight = [](const std::shared_ptr<CausalLM>& model) {
    return model->named_parameters()["model.layers.1.mlp.up_proj.weight"];
  };
  const torch::Tensor first = weight(initialized(wide_config(), 5));
  EXPECT_TRUE(at::equal(first, weight(initialized(wide_config(), 5))));
  EXPECT_FALSE(at::equal(first, weight(initialized(wide_config(), 6))));
  // Drawn in float32 whatever the weights' format.
  EXPECT_TRUE(at::equal(first.to(torch::kBFloat16), weight(initialized(wide_config(), 5, torch::kBFloat16))));
}

}  // namespace
}  // namespace moesaic::models
