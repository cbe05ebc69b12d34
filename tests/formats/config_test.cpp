#include "moesaic/formats/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

Json normalise(const char* text) { return normalise_config(parse_json(text, "config.json"), "config.json"); }

TEST(Config, Transformers4BecomesTransformers5) {
  const Json config = normalise(R"({"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 500000.0,
      "max_position_embeddings": 131072, "hidden_size": 8,
      "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192, "rope_type": "llama3"}})");
  EXPECT_EQ(config, parse_json(R"({"model_type": "llama", "dtype": "bfloat16", "max_position_embeddings": 131072,
      "hidden_size": 8,
      "rope_parameters": {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}})",
                               ""));
}

TEST(Config, Transformers5StaysAsItIs) {
  const char* text = R"({"model_type": "qwen3", "dtype": "float32", "max_position_embeddings": 64,
      "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}})";
  EXPECT_EQ(normalise(text), parse_json(text, ""));
}

TEST(Config, RopeWithoutNumbers) {
  EXPECT_EQ(normalise(R"({"model_type": "llama"})")["rope_parameters"], parse_json(R"({"rope_type": "default"})", ""));
  // The old key "type"; yarn's original length is the trained one when the file names none.
  EXPECT_EQ(normalise(R"({"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768,
                          "rope_scaling": {"type": "yarn", "factor": 4}})")["rope_parameters"],
            parse_json(R"({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4,
                           "original_max_position_embeddings": 32768})",
                       ""));
  EXPECT_EQ(
      normalise(R"({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0})")["rope_parameters"]["rope_theta"],
      7.0);
}

TEST(Config, Gemma3HasTwoRopes) {
  const Json config = normalise(R"({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 5e3,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 4, "sliding_window_pattern": 2})");
  EXPECT_EQ(config["rope_parameters"], parse_json(R"({
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}})",
                                                  ""));
  EXPECT_FALSE(config.contains("rope_local_base_freq"));
}

TEST(Config, RopeScalingCountsBesideRopeParameters) {
  EXPECT_EQ(normalise(R"({"rope_theta": 3e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
                          "rope_scaling": {"rope_type": "linear", "factor": 2.0}})")["rope_parameters"],
            parse_json(R"({"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5})", ""));
  EXPECT_EQ(normalise(R"({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0},
                                              "sliding_attention": {"rope_type": "default", "rope_theta": 5.0}},
                          "rope_scaling": {"rope_type": "linear", "factor": 2.0}})")["rope_parameters"],
            parse_json(R"({"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
                           "sliding_attention": {"rope_type": "default", "rope_theta": 5.0}})",
                       ""));
}

TEST(Config, MultiModalGivesItsTextPart) {
  const Json config = normalise(R"({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
      "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
      "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
                      "rope_scaling": {"rope_type": "linear", "factor": 8.0}}})");
  EXPECT_EQ(config["model_type"], "gemma3_text");
  EXPECT_EQ(config["hidden_size"], 2560);
  EXPECT_EQ(config["eos_token_id"], parse_json("[1, 106]", ""));
  EXPECT_EQ(config["dtype"], "bfloat16");
  EXPECT_EQ(config["rope_parameters"], parse_json(R"({"rope_type": "linear", "factor": 8.0})", ""));
  EXPECT_FALSE(config.contains("vision_config"));
}

TEST(Config, WhatHasNoSuchShapeIsNamed) {
  EXPECT_ERROR(normalise(R"({"rope_scaling": 7})"), ConfigError, "expected an object");
  EXPECT_ERROR(normalise(R"({"torch_dtype": 7})"), ConfigError, "dtype");
  EXPECT_ERROR(normalise("[1]"), ConfigError, "not a JSON object");
  EXPECT_ERROR(normalise(R"({"rope_theta": NaN})"), FormatError, "config.json");
  EXPECT_ERROR(normalise(R"({"rope_theta": 1e999})"), FormatError, "config.json");
  EXPECT_ERROR(normalise(R"({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}})"), ConfigError,
               "full_attention");
}

TEST(Config, LegacyKeysGoBackToTheSameConfig) {
  for (const char* text :
       {R"({"model_type": "llama", "rope_theta": 3e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})",
        R"({"model_type": "llama", "rope_theta": 3e5, "rope_scaling": null})",
        R"({"model_type": "gemma3_text", "rope_theta": 3e5, "rope_local_base_freq": 77.0, "num_hidden_layers": 2})"}) {
    const Json config = normalise(text);
    Json legacy = with_legacy_rope_keys(config);
    EXPECT_EQ(legacy["rope_theta"], 3e5);
    EXPECT_EQ(normalise_config(legacy, ""), config) << "both kinds of keys together";
    legacy.erase("rope_parameters");
    EXPECT_EQ(normalise_config(legacy, ""), config) << text;
  }
}

}  // namespace
}  // namespace moesaic::formats
