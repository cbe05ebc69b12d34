#include "moesaic/adapters/replacements.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic::adapters {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const std::string kEmbedding = "model.embed_tokens.weight", kHead = "lm_head.weight", kNorm = "model.norm.weight",
                  kBias = "model.layers.0.self_attn.q_proj.bias";

/// Names of what is taken; "*" behind one that the file does not hold itself.
std::vector<std::string> taken(const std::vector<std::string>& saved, bool tying, bool tied,
                               formats::TensorMap& tensors, const std::string& bias = "none") {
  AdapterConfig config;
  config.bias = bias;
  config.modules_to_save = saved;
  config.ensure_weight_tying = tying;
  std::vector<std::string> names;
  formats::Declarations base{{kNorm, {{3}}}, {kEmbedding, {{5, 3}}}, {kBias, {{4}}}};
  if (!tied) base[kHead] = {{5, 3}};
  for (const Replacement& each : take_replacements(config, tensors, tied, base)) {
    names.push_back(each.name + (each.in_file ? "" : "*"));
  }
  return names;
}

TEST(Replacements, WholeWeightsAreTakenOutOfTheFile) {
  formats::TensorMap tensors{{kEmbedding, torch::ones({5, 3})}, {kNorm, torch::ones({3})}, {"x.lora_A.weight", {}}};
  EXPECT_THAT(taken({"embed_tokens", "norm"}, false, false, tensors), testing::ElementsAre(kEmbedding, kNorm));
  EXPECT_EQ(tensors.size(), 1u);
}

TEST(Replacements, AModuleIsHeldWithAllThatIsInIt) {
  formats::TensorMap tensors{{kNorm, torch::ones({3})}, {kHead, torch::ones({5, 3})}};
  EXPECT_THAT([&] { taken({"model"}, false, false, tensors); },
              ThrowsMessage<DataError>(
                  AllOf(HasSubstr(kBias + " (modules_to_save)"), HasSubstr(kEmbedding + " (modules_to_save)"))));
  tensors = {{kNorm, torch::ones({3})}, {kEmbedding, torch::ones({5, 3})}, {kBias, torch::ones({4})}};
  EXPECT_EQ(taken({"model"}, false, false, tensors).size(), 3u);
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
  formats::TensorMap tensors{{kEmbedding, torch::ones({6, 4})}, {kNorm, torch::ones({4})}};
  EXPECT_THAT([&] { taken({"score"}, false, false, tensors); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("score"), HasSubstr("got [6, 4], expected [5, 3]"),
                                             HasSubstr("got [4], expected [3]"))));
}

TEST(Replacements, AResizedVocabularyHasBothItsMatrices) {
  const torch::Tensor more = torch::ones({6, 3});
  formats::TensorMap both{{kEmbedding, more}, {kHead, more}}, one{{kEmbedding, more}};
  EXPECT_THAT(taken({}, false, false, both), testing::ElementsAre(kHead, kEmbedding));
  formats::TensorMap again = one;
  EXPECT_THAT(taken({}, false, /*tied=*/true, again), testing::ElementsAre(kEmbedding, kHead + "*"));
  for (const bool tied : {false, true}) {
    again = one;
    EXPECT_THAT([&] { taken({"embed_tokens"}, false, tied, again); },
                ThrowsMessage<DataError>(HasSubstr("6 rows of the embedding and 5 of the head")));
  }
}

TEST(Replacements, BiasesThatTheConfigPromises) {
  for (const char* bias : {"all", "lora_only"}) {
    const std::string module = "model.layers.0.self_attn.q_proj";
    formats::TensorMap tensors{{module + ".lora_A.weight", torch::ones({2, 3})}};
    EXPECT_THAT([&] { taken({}, false, false, tensors, bias); }, ThrowsMessage<DataError>(HasSubstr(kBias)));
    tensors[module + ".base_layer.bias"] = torch::ones({4});
    EXPECT_THAT(taken({}, false, false, tensors, bias), testing::ElementsAre(kBias));
  }
  formats::TensorMap none;
  EXPECT_THAT(taken({}, false, false, none, "lora_only"), testing::IsEmpty());
}

}  // namespace
}  // namespace moesaic::adapters
