#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "moesaic/base/check.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "tests/formats/files.h"

namespace moesaic::models {
namespace {

using testing::HasSubstr;

DecoderConfig parse(Json config) { return parse_decoder_config(config, "config.json"); }

std::string message(Json config) {
  try {
    parse(std::move(config));
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ParseDecoderConfig, DefaultsAreThoseOfTransformers) {
  const auto llama = parse({{"model_type", "llama"}});
  EXPECT_EQ(llama.hidden_size, 4096);
  EXPECT_EQ(llama.num_kv_heads, 32);
  EXPECT_EQ(llama.head_dim, 128);
  EXPECT_EQ(llama.eos_ids, std::vector<int64_t>{2});
  EXPECT_EQ(llama.bos_id, 1);
  EXPECT_FALSE(llama.tie_word_embeddings);
  EXPECT_EQ(llama.sliding_window, 0);

  const auto mistral = parse({{"model_type", "mistral"}});
  EXPECT_EQ(mistral.num_kv_heads, 8);
  EXPECT_EQ(mistral.sliding_window, 4096);
  EXPECT_EQ(parse({{"model_type", "mistral"}, {"sliding_window", nullptr}}).sliding_window, 0);

  const auto qwen2 = parse({{"model_type", "qwen2"}});
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias);
  EXPECT_EQ(qwen2.sliding_window, 0);
  EXPECT_TRUE(qwen2.eos_ids.empty());

  const auto qwen3 =
      parse({{"model_type", "qwen3"}, {"hidden_size", 1024}, {"num_attention_heads", 16}, {"num_key_value_heads", 8}});
  EXPECT_EQ(qwen3.head_dim, 128);
  EXPECT_TRUE(qwen3.qk_norm);

  const auto gemma = parse({{"model_type", "gemma3_text"}});
  EXPECT_TRUE(gemma.tie_word_embeddings);
  EXPECT_EQ(gemma.activation, Activation::kGeluTanh);
  EXPECT_DOUBLE_EQ(gemma.embedding_scale, 48.0);  // sqrt(2304)
  EXPECT_DOUBLE_EQ(gemma.query_scale, 1.0 / 16);
  EXPECT_EQ(gemma.rope.theta, 1e6);
  EXPECT_EQ(gemma.rope_local->theta, 1e4);
  // Every sixth layer is global.
  EXPECT_EQ(gemma.layer_is_sliding[4], 1);
  EXPECT_EQ(gemma.layer_is_sliding[5], 0);
}

TEST(ParseDecoderConfig, OlderGemmas) {
  // The first Gemma's files name plain gelu and mean its tanh form.
  const auto one = parse({{"model_type", "gemma"}, {"hidden_act", "gelu"}, {"hidden_activation", nullptr}});
  EXPECT_EQ(one.activation, Activation::kGeluTanh);
  EXPECT_DOUBLE_EQ(one.embedding_scale, std::sqrt(3072.0));
  EXPECT_TRUE(one.norm_plus_one);
  EXPECT_FALSE(one.pre_post_norms);
  EXPECT_EQ(one.final_softcap, 0.0);
  EXPECT_EQ(one.sliding_window, 0);

  const auto two = parse({{"model_type", "gemma2"}, {"num_hidden_layers", 3}});
  EXPECT_TRUE(two.pre_post_norms);
  EXPECT_DOUBLE_EQ(two.query_scale, 1.0 / 16);
  EXPECT_EQ(two.attention_softcap, 50.0);
  EXPECT_EQ(two.final_softcap, 30.0);
  EXPECT_EQ(two.sliding_window, 4096);
  EXPECT_EQ(two.layer_is_sliding, (std::vector<uint8_t>{1, 0, 1}));
  const auto plain = parse({{"model_type", "gemma2"},
                            {"attn_logit_softcapping", nullptr},
                            {"final_logit_softcapping", nullptr},
                            {"sliding_window", nullptr}});
  EXPECT_EQ(plain.attention_softcap, 0.0);
  EXPECT_EQ(plain.final_softcap, 0.0);
  EXPECT_EQ(plain.sliding_window, 0);
}

TEST(ParseDecoderConfig, ReadsRopeAsTransformers4And5WriteIt) {
  const Json rope{{"rope_type", "llama3"},
                  {"factor", 8.0},
                  {"low_freq_factor", 1.0},
                  {"high_freq_factor", 4.0},
                  {"original_max_position_embeddings", 8192}};
  Json with_theta = rope;
  with_theta["rope_theta"] = 5e5;
  const auto four = parse({{"model_type", "llama"}, {"rope_theta", 5e5}, {"rope_scaling", rope}});
  const auto five = parse({{"model_type", "llama"}, {"rope_parameters", with_theta}});
  for (const auto& config : {four, five}) {
    EXPECT_EQ(config.rope.type, "llama3");
    EXPECT_EQ(config.rope.theta, 5e5);
    EXPECT_EQ(config.rope.factor, 8.0);
    EXPECT_EQ(config.rope.original_max_position, 8192);
  }
  const auto old = parse({{"model_type", "llama"}, {"rope_scaling", {{"type", "linear"}, {"factor", 2}}}});
  EXPECT_EQ(old.rope.type, "linear");
  const auto gemma = parse({{"model_type", "gemma3_text"},
                            {"rope_parameters",
                             {{"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 2e6}}},
                              {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 3e4}}}}}});
  EXPECT_EQ(gemma.rope.type, "linear");
  EXPECT_EQ(gemma.rope.theta, 2e6);
  EXPECT_EQ(gemma.rope_local->theta, 3e4);
}

TEST(ParseDecoderConfig, QwenWindowsStartAtMaxWindowLayers) {
  const auto config = parse({{"model_type", "qwen2"},
                             {"num_hidden_layers", 3},
                             {"use_sliding_window", true},
                             {"sliding_window", 9},
                             {"max_window_layers", 2}});
  EXPECT_EQ(config.sliding_window, 9);
  EXPECT_EQ(config.layer_is_sliding, (std::vector<uint8_t>{0, 0, 1}));
  const auto listed = parse({{"model_type", "qwen3"},
                             {"num_hidden_layers", 2},
                             {"use_sliding_window", true},
                             {"sliding_window", 9},
                             {"layer_types", {"sliding_attention", "full_attention"}}});
  EXPECT_EQ(listed.layer_is_sliding, (std::vector<uint8_t>{1, 0}));
}

TEST(ParseDecoderConfig, EosMayBeAList) {
  EXPECT_EQ(parse({{"model_type", "llama"}, {"eos_token_id", {7, 9}}}).eos_ids, (std::vector<int64_t>{7, 9}));
  EXPECT_TRUE(parse({{"model_type", "llama"}, {"eos_token_id", nullptr}}).eos_ids.empty());
}

TEST(ParseDecoderConfig, UnknownFamiliesNameTheKnownOnes) {
  const std::string text = message({{"model_type", "lama"}});
  EXPECT_THAT(text, HasSubstr("got \"lama\", expected one of gemma, gemma2, gemma3_text, granitemoe, granitemoeshared, "
                              "llama, mistral, mixtral, mt5, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe, "
                              "switch_transformers, t5, t5gemma, t5gemma2, umt5"));
  EXPECT_THAT(text, HasSubstr("Did you mean llama?"));
  EXPECT_THAT(message(Json::object()), HasSubstr("model_type"));
  EXPECT_THAT(message(Json::array()), HasSubstr("is not a JSON object"));
}

TEST(ParseDecoderConfig, ListsEveryImpossibleValue) {
  const std::string text = message({{"model_type", "llama"},
                                    {"hidden_size", 0},
                                    {"num_hidden_layers", -3},
                                    {"vocab_size", 1e18},
                                    {"rms_norm_eps", std::numeric_limits<double>::quiet_NaN()},
                                    {"intermediate_size", "wide"},
                                    {"num_attention_heads", 8},
                                    {"num_key_value_heads", 3},
                                    {"tie_word_embeddings", 1},
                                    {"hidden_act", "relu"},
                                    {"rope_theta", -1.0},
                                    {"rope_scaling", {{"rope_type", "linear"}, {"factor", 0}}}});
  for (const char* key :
       {"hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "intermediate_size", "num_key_value_heads",
        "tie_word_embeddings", "hidden_act", "rope_parameters.rope_theta", "rope_parameters.factor"}) {
    EXPECT_THAT(text, HasSubstr(std::string("'") + key + "'"));
  }
}

TEST(ParseDecoderConfig, RefusesWhatWouldComputeNonsense) {
  EXPECT_THAT(message({{"model_type", "llama"}, {"head_dim", 7}}), HasSubstr("even"));
  EXPECT_THAT(message({{"model_type", "llama"}, {"hidden_size", 100}}),
              HasSubstr("multiple of num_attention_heads 32"));
  EXPECT_THAT(message({{"model_type", "gemma3_text"}, {"use_bidirectional_attention", true}}), HasSubstr("causal"));
  EXPECT_THAT(message({{"model_type", "gemma3_text"}, {"sliding_window", nullptr}}), HasSubstr("sliding_window"));
  EXPECT_THAT(message({{"model_type", "qwen2"}, {"layer_types", {"full_attention"}}}), HasSubstr("a list of 32 names"));
  EXPECT_THAT(message({{"model_type", "llama"}, {"rope_parameters", {{"partial_rotary_factor", 0.5}}}}),
              HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(message({{"model_type", "llama"}, {"rope_scaling", {{"rope_type", "longrope"}}}}),
              HasSubstr("'rope_parameters.rope_type'"));
  EXPECT_THAT(message({{"model_type", "llama"}, {"rope_scaling", {{"rope_type", "linear"}}}}), HasSubstr("factor"));
  EXPECT_THAT(message({{"model_type", "llama"},
                       {"rope_scaling",
                        {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}}}}),
              HasSubstr("more than low_freq_factor"));
}

TEST(OpenCheckpoint, WhatIsNoModelIsExplained) {
  const test::TemporaryFolder folder;
  EXPECT_ERROR(open_checkpoint(folder / "none"), DataError, "no such file", ".gguf");
  formats::test::write_file(folder / "config.json", "{}");
  EXPECT_ERROR(open_checkpoint(folder / "config.json"), DataError, "give the folder", folder.path().string());
  formats::test::write_file(folder / "text.txt", "hello");
  EXPECT_ERROR(open_checkpoint(folder / "text.txt"), FormatError, "text.txt");
}

}  // namespace
}  // namespace moesaic::models
