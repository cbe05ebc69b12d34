#include "moesaic/compose/released.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/formats/safetensors.h"
#include "moesaic/models/registry.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::compose {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

/// A checkpoint of the released code: anchor of width 20 and 3 blocks, augmenting model of width 14 and 4 blocks.
class ReleasedCheckpoint : public ::testing::Test {
 protected:
  ReleasedCheckpoint() {
    test::write_small_model(anchor(), "gpt2", 20, 3, 1);
    test::write_small_model(aug(), "gpt2", 14, 4, 2);
    fs::create_directories(dir());
    torch::manual_seed(3);
    for (int k : {0, 1}) {
      const std::string hook = fmt::format("cross_attention_hooks.{}.", k);
      tensors_[hook + "proj.weight"] = torch::randn({20, 14});
      tensors_[hook + "proj.bias"] = torch::randn({20});
      tensors_[hook + "cross_attention.in_proj_weight"] = torch::randn({60, 20});
      tensors_[hook + "cross_attention.in_proj_bias"] = torch::randn({60});
      tensors_[hook + "cross_attention.out_proj.weight"] = torch::randn({20, 20});
      tensors_[hook + "cross_attention.out_proj.bias"] = torch::randn({20});
      tensors_[hook + "post_attention_layernorm.weight"] = torch::randn({20});
    }
    config_ = {{"model_type", "calm"},
               {"anchor_model", anchor().string()},
               {"aug_model", aug().string()},
               {"num_connections", 2},
               {"num_heads", 2}};
  }
  fs::path dir() const { return root_.path() / "released"; }
  fs::path anchor() const { return root_.path() / "anchor"; }
  fs::path aug() const { return root_.path() / "aug"; }

  /// Adds the checkpoint's copies of both models.
  void add_bases() {
    for (const auto& [prefix, path] : {std::pair("anchor_model.", anchor()), {"aug_model.", aug()}}) {
      const auto base = models::open_checkpoint(path);
      for (const auto& name : base->names()) tensors_[prefix + name] = base->tensor(name).clone();
    }
  }
  std::shared_ptr<Composition> import(const ReleasedOptions& options = {}) const {
    formats::save_safetensors(dir() / "model.safetensors", tensors_);
    write_file_atomically(dir() / "config.json", config_.dump());
    return import_released(dir(), options);
  }
  std::string error(const ReleasedOptions& options = {}) const {
    try {
      import(options);
    } catch (const DataError& error) {
      return error.what();
    }
    return "converts";
  }

  test::TemporaryFolder root_;
  formats::TensorMap tensors_;
  Json config_;
};

TEST_F(ReleasedCheckpoint, BecomesAComposition) {
  add_bases();
  const auto composition = import();
  const CompositionConfig& config = composition->config();
  EXPECT_EQ(config.connection.num_heads, 2);
  EXPECT_EQ(config.connection.cross_position, "none");
  EXPECT_EQ(config.connection.norm, "post");
  EXPECT_TRUE(config.connection.attention_bias);
  EXPECT_EQ(config.augmenting[0].mask, "full");
  EXPECT_EQ(config.augmenting[0].connections, (std::vector<ConnectionPair>{{0, 0}, {2, 3}}));
  auto parameters = composition->named_parameters();
  const torch::Tensor in = tensors_["cross_attention_hooks.1.cross_attention.in_proj_weight"];
  EXPECT_TRUE(torch::equal(parameters["connections.1.q_proj.weight"], in.slice(0, 0, 20)));
  EXPECT_TRUE(torch::equal(parameters["connections.1.k_proj.weight"], in.slice(0, 20, 40)));
  EXPECT_TRUE(torch::equal(parameters["connections.1.v_proj.weight"], in.slice(0, 40, 60)));
  EXPECT_TRUE(torch::equal(parameters["connections.0.norm.weight"],
                           tensors_["cross_attention_hooks.0.post_attention_layernorm.weight"]));
  // It survives its own folder.
  save_composition(*composition, root_.path() / "calm");
  const auto again = load_composition(root_.path() / "calm", {});
  EXPECT_TRUE(torch::equal(test::logits_of(*again, {{5, 6, 7}}), test::logits_of(*composition, {{5, 6, 7}})));
}

TEST_F(ReleasedCheckpoint, DefaultsThatTransformersLeavesOut) {
  config_.erase("num_heads");  // 1
  EXPECT_EQ(import()->config().connection.num_heads, 1);
  config_.erase("anchor_model");  // google/gemma-2b
  EXPECT_THAT(error(), AllOf(HasSubstr("anchor_model: 'google/gemma-2b' is no folder"), HasSubstr("--anchor")));
  EXPECT_NO_THROW(import({.anchor = anchor(), .augmenting = {}, .load = {}}));
}

TEST_F(ReleasedCheckpoint, EveryWrongTensorIsListed) {
  add_bases();
  tensors_.erase("cross_attention_hooks.0.proj.bias");
  tensors_["cross_attention_hooks.1.proj.weight"] = torch::zeros({20, 15});
  tensors_["cross_attention_hooks.2.proj.weight"] = torch::zeros({20, 14});
  tensors_["anchor_model.model.norm.weight"] += 1;
  tensors_.erase("aug_model.model.layers.3.mlp.up_proj.weight");
  tensors_["aug_model.model.layers.4.mlp.up_proj.weight"] = torch::zeros({2});
  EXPECT_THAT(error(), AllOf(HasSubstr("missing (2):\n    aug_model.model.layers.3.mlp.up_proj.weight\n"),
                             HasSubstr("hooks.1.proj.weight: got [20, 15], expected [20, 14]"),
                             HasSubstr("unexpected (2):\n    aug_model.model.layers.4.mlp.up_proj.weight\n"),
                             HasSubstr("anchor_model.model.norm.weight: other numbers than in"),
                             HasSubstr("\n    cross_attention_hooks.0.proj.bias\n"),
                             HasSubstr("\n    cross_attention_hooks.2.proj.weight\n")));
}

TEST_F(ReleasedCheckpoint, WhatCannotBeConvertedSaysWhy) {
  config_["connections"] = {{1, 0}, {1, 2}};
  EXPECT_THAT(error(), HasSubstr("several connections add to anchor block 1"));
  config_["connections"] = {{1, 0}, {3, 2}};
  EXPECT_THAT(error(), HasSubstr("anchor 3"));
  config_["connections"] = {{1, 0}, {2, -1}};
  EXPECT_THAT(error(), HasSubstr("got [2,-1], expected [anchor block, aug block]"));
  config_.erase("connections");
  config_["num_heads"] = 3;
  EXPECT_THAT(error(), HasSubstr("num_heads: got 3"));
  config_["num_heads"] = 2;
  config_["num_connections"] = 0;
  EXPECT_THAT(error(), HasSubstr("num_connections: got 0"));
  config_["num_connections"] = 2;
  write_file_atomically(aug() / "tokenizer.json", test::golden_tokenizer("llama3")->json());
  EXPECT_THAT(error(), AllOf(HasSubstr("tokenizers"), HasSubstr("differ")));
  config_["model_type"] = "llama";
  EXPECT_THAT(error(), HasSubstr("got \"llama\", expected \"calm\""));
  fs::remove_all(dir());
  EXPECT_THROW(import_released(dir(), {}), DataError);
}

TEST(ReleasedPairs, AreNumPysLinspace) {
  EXPECT_EQ(released_pairs(3, 18, 18), (std::vector<ConnectionPair>{{0, 0}, {8, 8}, {17, 17}}));
  EXPECT_EQ(released_pairs(1, 9, 5), (std::vector<ConnectionPair>{{0, 0}}));
  EXPECT_EQ(released_pairs(2, 1, 3), (std::vector<ConnectionPair>{{0, 0}, {0, 2}}));
  // np.linspace(0, 30, 23)[11] is 14.999999999999998, which becomes 14.
  EXPECT_EQ(released_pairs(23, 31, 31)[11], (ConnectionPair{14, 14}));
}

}  // namespace
}  // namespace moesaic::compose
