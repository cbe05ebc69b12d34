#include "moesaic/adapters/replacements.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::adapters {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const std::string kEmbedding = "model.embed_tokens.weight", kHead = "lm_head.weight", kNorm = "model.norm.weight";

/// Names of what is taken; "*" behind one that the file does not hold itself.
std::vector<std::string> taken(const std::vector<std::string>& saved, bool tying, bool tied,
                               formats::TensorMap& tensors) {
  AdapterConfig config;
  config.modules_to_save = saved;
  config.ensure_weight_tying = tying;
  std::vector<std::string> names;
  for (const Replacement& each : take_replacements(config, tensors, tied, [&](const std::string& name) {
         return name == kNorm                                    ? std::vector<int64_t>{3}
                : name == kEmbedding || (name == kHead && !tied) ? std::vector<int64_t>{5, 3}
                                                                 : std::vector<int64_t>{};
       })) {
    names.push_back(each.name + (each.in_file ? "" : "*"));
  }
  return names;
}

TEST(Replacements, WholeWeightsAreTakenOutOfTheFile) {
  formats::TensorMap tensors{{kEmbedding, torch::ones({5, 3})}, {kNorm, torch::ones({3})}, {"x.lora_A.weight", {}}};
  EXPECT_THAT(taken({"embed_tokens", "norm"}, false, false, tensors), testing::ElementsAre(kEmbedding, kNorm));
  EXPECT_EQ(tensors.size(), 1u);
}

TEST(Replacements, OfATiedPair) {
  const formats::TensorMap embedding{{kEmbedding, torch::ones({5, 3})}}, head{{kHead, torch::ones({5, 3})}};
  auto of = [](formats::TensorMap tensors, const std::vector<std::string>& saved, bool tying) {
    return taken(saved, tying, /*tied=*/true, tensors);
  };
  EXPECT_THAT(of(embedding, {"embed_tokens"}, false), testing::ElementsAre(kEmbedding));
  EXPECT_THAT(of(embedding, {"embed_tokens"}, true), testing::ElementsAre(kEmbedding, kHead + "*"));
  EXPECT_THAT(of(embedding, {}, false), testing::ElementsAre(kEmbedding, kHead + "*"));
  EXPECT_THAT(of(head, {"lm_head"}, false), testing::ElementsAre(kHead));
}

TEST(Replacements, WhatDoesNotFitIsListed) {
  formats::TensorMap tensors{{kEmbedding, torch::ones({6, 3})},
                             {"model.layers.9.input_layernorm.weight", torch::ones({3})}};
  EXPECT_THAT([&] { taken({"score"}, false, false, tensors); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("score"), HasSubstr("got [6, 3], expected [5, 3]"),
                                             HasSubstr("resized vocabulary"), HasSubstr("layers.9"))));
}

}  // namespace
}  // namespace moesaic::adapters
