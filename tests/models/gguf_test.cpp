#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <numbers>

#include "moesaic/base/check.h"
#include "moesaic/models/registry.h"
#include "tests/formats/files.h"

namespace moesaic::models {
namespace {

using formats::test::GgufBuilder;
using formats::test::raw;
using formats::test::raw_all;

/// Metadata every model has: width 8, 2 heads of 4, 1 key-value head, 1 layer.
GgufBuilder metadata(const std::string& arch) {
  GgufBuilder builder;
  builder.string("general.architecture", arch)
      .u32(arch + ".embedding_length", 8)
      .u32(arch + ".feed_forward_length", 4)
      .u32(arch + ".block_count", 1)
      .u32(arch + ".attention.head_count", 2)
      .u32(arch + ".attention.head_count_kv", 1)
      .u32(arch + ".context_length", 64)
      .f32(arch + ".attention.layer_norm_rms_epsilon", 0.125f);
  return builder;
}

std::vector<float> count_from(float first, size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), first);
  return values;
}

GgufBuilder& add_embedding(GgufBuilder& builder) {
  return builder.tensor("token_embd.weight", {8, 3}, count_from(0, 24));
}

std::shared_ptr<formats::Checkpoint> open(GgufBuilder builder) {
  add_embedding(builder);
  return open_gguf(builder.bytes());
}

TEST(Gguf, LlamaConfigAndNames) {
  GgufBuilder builder = metadata("llama");
  builder.f32("llama.rope.freq_base", 5000.f).u32("tokenizer.ggml.eos_token_id", 2);
  for (const char* part : {"attn_norm", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}) {
    builder.tensor(std::string("blk.0.") + part + ".weight", {1}, {1});
  }
  builder.tensor("output_norm.weight", {8}, count_from(0, 8)).tensor("output.weight", {8, 3}, count_from(0, 24));
  const auto checkpoint = open(builder);
  EXPECT_THAT(
      checkpoint->names(),
      testing::UnorderedElementsAre(
          "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
          "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight",
          "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
          "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"));
  EXPECT_EQ(checkpoint->config(), parse_json(R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"],
      "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
      "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 0.125, "vocab_size": 3,
      "hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
      "dtype": "float32", "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})",
                                             ""));
  EXPECT_EQ(checkpoint->generation_config()["eos_token_id"], 2);
  EXPECT_EQ(checkpoint->tokenizer_json(), std::nullopt);
}

// llama.cpp stores the two halves of a head interleaved: stored row 2i is row i of the model, row 2i+1 is row i+2.
TEST(Gguf, LlamaQueryAndKeyRowsComeBackInOrder) {
  GgufBuilder builder = metadata("llama");
  builder
      .tensor("blk.0.attn_q.weight", {1, 8}, {0, 2, 1, 3, 4, 6, 5, 7})  // 2 heads
      .tensor("blk.0.attn_q.bias", {8}, {0, 2, 1, 3, 4, 6, 5, 7})
      .tensor("blk.0.attn_k.weight", {1, 4}, {0, 2, 1, 3})  // 1 head
      .tensor("blk.0.attn_v.weight", {1, 4}, {0, 1, 2, 3});
  const auto checkpoint = open(builder);
  const std::string layer = "model.layers.0.self_attn.";
  EXPECT_TRUE(at::equal(checkpoint->tensor(layer + "q_proj.weight"), torch::arange(8, at::kFloat).unsqueeze(1)));
  EXPECT_TRUE(at::equal(checkpoint->tensor(layer + "q_proj.bias"), torch::arange(8, at::kFloat)));
  EXPECT_TRUE(at::equal(checkpoint->tensor(layer + "k_proj.weight"), torch::arange(4, at::kFloat).unsqueeze(1)));
  EXPECT_TRUE(at::equal(checkpoint->tensor(layer + "v_proj.weight"), torch::arange(4, at::kFloat).unsqueeze(1)));
  EXPECT_EQ(checkpoint->config()["attention_bias"], true);

  for (const auto dtype : {at::kBFloat16, at::kDouble}) {
    at::Tensor columns = torch::zeros({1, 8}, dtype);
    checkpoint->read_into(layer + "q_proj.weight", columns.t());
    EXPECT_TRUE(at::equal(columns, torch::arange(8, dtype).unsqueeze(0))) << c10::toString(dtype);
  }
  EXPECT_ERROR(checkpoint->read_into(layer + "q_proj.weight", torch::zeros({8})), ShapeError, "8x1", "q_proj");
}

TEST(Gguf, QwenRowsAreLeftAlone) {
  for (const char* arch : {"qwen2", "qwen3"}) {
    GgufBuilder builder = metadata(arch);
    builder.tensor("blk.0.attn_q.weight", {1, 8}, count_from(0, 8))
        .tensor("blk.0.attn_q_norm.weight", {4}, {1, 2, 3, 4});
    const auto checkpoint = open(builder);
    EXPECT_TRUE(at::equal(checkpoint->tensor("model.layers.0.self_attn.q_proj.weight").flatten(),
                          torch::arange(8, at::kFloat)));
    EXPECT_TRUE(
        at::equal(checkpoint->tensor("model.layers.0.self_attn.q_norm.weight"), torch::tensor({1.f, 2.f, 3.f, 4.f})));
    EXPECT_EQ(checkpoint->config()["model_type"], arch);
    EXPECT_EQ(checkpoint->config()["tie_word_embeddings"], true);
  }
}

TEST(Gguf, GemmaNormsLoseTheirOne) {
  GgufBuilder builder = metadata("gemma3");
  builder.u32("gemma3.attention.key_length", 6)
      .u32("gemma3.attention.sliding_window", 512)
      .f32("gemma3.rope.freq_base", 1e6f)
      .string("gemma3.rope.scaling.type", "linear")
      .f32("gemma3.rope.scaling.factor", 8.f)
      .tensor("output_norm.weight", {2}, {1.5f, 0.25f})
      .tensor("blk.0.post_attention_norm.weight", {2}, {3, 1})
      .tensor("blk.0.ffn_norm.weight", {2}, {1, 1})
      .tensor("blk.0.post_ffw_norm.weight", {2}, {1, 1})
      .tensor("blk.0.attn_q_norm.weight", {2}, {2, 0})
      .tensor("blk.0.attn_q.weight", {1, 8}, count_from(0, 8));
  const auto checkpoint = open(builder);
  EXPECT_TRUE(at::equal(checkpoint->tensor("model.norm.weight"), torch::tensor({0.5f, -0.75f})));
  EXPECT_TRUE(at::equal(checkpoint->tensor("model.layers.0.self_attn.q_norm.weight"), torch::tensor({1.f, -1.f})));
  EXPECT_TRUE(
      at::equal(checkpoint->tensor("model.layers.0.post_attention_layernorm.weight"), torch::tensor({2.f, 0.f})));
  EXPECT_TRUE(
      at::equal(checkpoint->tensor("model.layers.0.self_attn.q_proj.weight").flatten(), torch::arange(8, at::kFloat)));
  EXPECT_TRUE(checkpoint->contains("model.layers.0.pre_feedforward_layernorm.weight"));
  EXPECT_TRUE(checkpoint->contains("model.layers.0.post_feedforward_layernorm.weight"));
  at::Tensor half = torch::zeros({2}, at::kBFloat16);
  checkpoint->read_into("model.norm.weight", half);
  EXPECT_TRUE(at::equal(half, torch::tensor({0.5f, -0.75f}).to(at::kBFloat16)));

  const Json& config = checkpoint->config();
  EXPECT_EQ(config["model_type"], "gemma3_text");
  EXPECT_EQ(config["head_dim"], 6);
  EXPECT_EQ(config["query_pre_attn_scalar"], 6);
  EXPECT_EQ(config["sliding_window"], 512);
  EXPECT_EQ(config["rope_parameters"], parse_json(R"({
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})",
                                                  ""));
}

TEST(Gguf, EarlierGemmasKeepTheirOnesToo) {
  for (const char* arch : {"gemma", "gemma2"}) {
    GgufBuilder builder = metadata(arch);
    builder.u32(std::string(arch) + ".attention.key_length", 6)
        .tensor("blk.0.attn_norm.weight", {2}, {1.5f, 0.25f})
        .tensor("blk.0.ffn_norm.weight", {2}, {3, 1});
    const bool second = std::string_view(arch) == "gemma2";
    if (second) {
      builder.u32("gemma2.attention.sliding_window", 64)
          .f32("gemma2.attn_logit_softcapping", 20.f)
          .f32("gemma2.final_logit_softcapping", 10.f);
    }
    const auto checkpoint = open(builder);
    const std::string norm = second ? "pre_feedforward_layernorm" : "post_attention_layernorm";
    EXPECT_TRUE(at::equal(checkpoint->tensor("model.layers.0." + norm + ".weight"), torch::tensor({2.f, 0.f})));
    EXPECT_EQ(checkpoint->config()["model_type"], arch);
    const DecoderConfig config = parse_decoder_config(checkpoint->config(), "");
    EXPECT_EQ(config.head_dim, 6);
    EXPECT_EQ(config.attention_softcap, second ? 20.0 : 0.0);
    EXPECT_EQ(config.final_softcap, second ? 10.0 : 0.0);
    EXPECT_EQ(config.sliding_window, second ? 64 : 0);
  }
}

TEST(Gguf, MistralIsALlamaWithAWindow) {
  const auto checkpoint = open(metadata("llama").u32("llama.attention.sliding_window", 16));
  EXPECT_EQ(checkpoint->config()["model_type"], "mistral");
  EXPECT_EQ(checkpoint->config()["sliding_window"], 16);
}

TEST(Gguf, StoredDtypes) {
  GgufBuilder builder = metadata("qwen2");
  // One Q8_0 block a row: scale 2 (0x4000), then 32 signed bytes.
  std::string block = raw<uint16_t>(0x4000);
  for (int i = 0; i < 32; ++i) block += static_cast<char>(i - 16);
  builder.tensor("blk.0.ffn_up.weight", {32, 2}, 8, block + block)
      .tensor("blk.0.ffn_down.weight", {2}, 1, raw_all<uint16_t>({0x3c00, 0xc000}))    // float16 1, -2
      .tensor("blk.0.ffn_gate.weight", {2}, 30, raw_all<uint16_t>({0x3f80, 0xc000}));  // bfloat16 1, -2
  const auto checkpoint = open(builder);
  const std::string mlp = "model.layers.0.mlp.";
  EXPECT_EQ(checkpoint->dtype(mlp + "up_proj.weight"), at::kFloat);
  EXPECT_EQ(checkpoint->dtype(mlp + "down_proj.weight"), at::kHalf);
  EXPECT_EQ(checkpoint->dtype(mlp + "gate_proj.weight"), at::kBFloat16);
  EXPECT_EQ(checkpoint->stored_type(mlp + "up_proj.weight"), "Q8_0");
  EXPECT_EQ(checkpoint->stored_type(mlp + "down_proj.weight"), "float16");
  EXPECT_EQ(checkpoint->stored_type(mlp + "gate_proj.weight"), "bfloat16");
  const at::Tensor row = torch::arange(-16, 16).to(at::kFloat) * 2;
  EXPECT_TRUE(at::equal(checkpoint->tensor(mlp + "up_proj.weight"), torch::stack({row, row})));
  for (const char* name : {"down_proj.weight", "gate_proj.weight"}) {
    const at::Tensor stored = checkpoint->tensor(mlp + name);
    EXPECT_EQ(stored.scalar_type(), checkpoint->dtype(mlp + name));
    at::Tensor read = torch::zeros({2});
    checkpoint->read_into(mlp + name, read);
    EXPECT_TRUE(at::equal(read, torch::tensor({1.f, -2.f}))) << name;
    EXPECT_TRUE(at::equal(stored.to(at::kFloat), read)) << name;
  }
  EXPECT_THAT(checkpoint->fingerprint(), testing::MatchesRegex("sha256-all:[0-9a-f]{64}"));
}

// Meta's own frequencies: wavelength 2 pi theta^(i/n); above 8192/1 divided by 8, below 8192/4 kept, smooth between.
TEST(Gguf, Llama3ScalingIsFoundAgain) {
  const auto factors = [](double original) {
    std::vector<float> values;
    for (int i = 0; i < 32; ++i) {
      const double wavelength = 2 * std::numbers::pi * std::pow(500000.0, i / 32.0);
      const double smooth = (original / wavelength - 1) / (4 - 1);
      values.push_back(static_cast<float>(wavelength < original / 4 ? 1
                                          : wavelength > original   ? 8
                                                                    : 1 / ((1 - smooth) / 8 + smooth)));
    }
    return values;
  };
  GgufBuilder builder = metadata("llama");
  builder.f32("llama.rope.freq_base", 500000.f).tensor("rope_freqs.weight", {32}, factors(8192));
  const auto checkpoint = open(builder);
  EXPECT_EQ(checkpoint->config()["rope_parameters"], parse_json(R"({"rope_type": "llama3", "rope_theta": 500000.0,
      "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})",
                                                                ""));
  EXPECT_FALSE(checkpoint->contains("rope_freqs.weight"));

  GgufBuilder other = metadata("llama");
  other.f32("llama.rope.freq_base", 500000.f).tensor("rope_freqs.weight", {32}, factors(4096));
  EXPECT_ERROR(open(other), DataError, "rope_freqs.weight", "can't be recovered");
}

TEST(Gguf, RopeScalings) {
  EXPECT_EQ(open(metadata("llama").f32("llama.rope.scale_linear", 4.f))->config()["rope_parameters"],
            parse_json(R"({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})", ""));
  EXPECT_EQ(open(metadata("qwen2")
                     .string("qwen2.rope.scaling.type", "yarn")
                     .f32("qwen2.rope.scaling.factor", 4.f)
                     .u32("qwen2.rope.scaling.original_context_length", 32))
                ->config()["rope_parameters"],
            parse_json(R"({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                           "original_max_position_embeddings": 32})",
                       ""));
  EXPECT_EQ(open(metadata("llama").string("llama.rope.scaling.type", "none"))->config()["rope_parameters"]["rope_type"],
            "default");
  EXPECT_ERROR(
      open(metadata("llama").string("llama.rope.scaling.type", "longrope").f32("llama.rope.scaling.factor", 2.f)),
      DataError, "longrope");
}

TEST(GgufRope, EveryKeyOfTheScalingCountsOrIsRefused) {
  auto rope = [](const auto& builder) { return open(builder)->config()["rope_parameters"]; };
  EXPECT_EQ(rope(metadata("llama").f32("llama.rope.scaling.factor", 4.f)),
            Json({{"rope_type", "linear"}, {"rope_theta", 10000.0}, {"factor", 4.0}}));
  const Json yarn = rope(metadata("llama")
                             .string("llama.rope.scaling.type", "yarn")
                             .f32("llama.rope.scaling.factor", 4.f)
                             .f32("llama.rope.scaling.attn_factor", 0.5f)
                             .f32("llama.rope.scaling.yarn_beta_fast", 16.f)
                             .f32("llama.rope.scaling.yarn_beta_slow", 2.f));
  EXPECT_NEAR(yarn["attention_factor"].get<double>(), 0.5 * (0.1 * std::log(4.0) + 1), 1e-6);
  EXPECT_EQ(yarn["beta_fast"], 16.0);
  EXPECT_EQ(yarn["beta_slow"], 2.0);
  const Json multiplied = rope(metadata("llama")
                                   .string("llama.rope.scaling.type", "yarn")
                                   .f32("llama.rope.scaling.factor", 4.f)
                                   .f32("llama.rope.scaling.yarn_log_multiplier", 1.f));
  EXPECT_NEAR(multiplied["attention_factor"].get<double>(), 1.0, 1e-6);
  const auto plain = open(metadata("llama").f32("llama.rope.scaling.attn_factor", 0.5f));
  EXPECT_EQ(plain->config()["rope_parameters"]["rope_type"], "default");
  EXPECT_EQ(parse_decoder_config(plain->config(), "test").rope.attention_factor, 0.5);
  EXPECT_ERROR(open(metadata("llama").f32("llama.rope.scaling.yarn_ext_factor", 0.5f)), DataError, "yarn_ext_factor");
  EXPECT_ERROR(open(metadata("llama").string("llama.rope.scaling.type", "longrope")), DataError, "longrope");
}

TEST(Gguf, WhatIsNotSupportedIsRefused) {
  EXPECT_ERROR(open(metadata("phi3")), DataError, "'phi3'", "gemma, gemma2, gemma3, granitemoe, llama, olmoe, qwen2");
  EXPECT_ERROR(open(GgufBuilder()), DataError, "general.architecture");
  EXPECT_ERROR(open(metadata("llama").string("general.type", "adapter")), DataError, "'adapter'");
  EXPECT_ERROR(open(metadata("llama").u32("llama.rope.dimension_count", 2).u32("llama.attention.key_length", 4)),
               DataError, "2 of each head's 4", "rotated");
  EXPECT_ERROR(
      open(metadata("llama").tensor("blk.0.ffn_gate_chexps.weight", {1}, {1}).tensor("blk.x.attn_q.weight", {1}, {1})),
      DataError, "blk.0.ffn_gate_chexps.weight", "blk.x.attn_q.weight");
  EXPECT_ERROR(open(GgufBuilder().string("general.architecture", "llama")), FormatError, "llama.embedding_length",
               "llama.block_count", "llama.attention.layer_norm_rms_epsilon");
  EXPECT_ERROR(open_gguf(metadata("llama").bytes()), FormatError, "token_embd.weight");
}

TEST(Gguf, ImpossibleMetadataIsRefused) {
  const auto with = [](const char* key, const std::string& payload, uint32_t type) {
    GgufBuilder builder;
    builder.string("general.architecture", "llama");
    for (const char* name :
         {"embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count"}) {
      if (std::string_view(key) != name) builder.u32(std::string("llama.") + name, 8);
    }
    if (std::string_view(key) != "attention.layer_norm_rms_epsilon")
      builder.f32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    return builder.value(std::string("llama.") + key, type, payload);
  };
  EXPECT_ERROR(open(with("attention.head_count", raw<uint32_t>(0), 4)), FormatError, "head_count 0");
  EXPECT_ERROR(open(with("attention.head_count_kv", raw<uint32_t>(0), 4)), FormatError, "head_count_kv 0");
  EXPECT_ERROR(open(with("embedding_length", raw<uint64_t>(UINT64_MAX), 10)), FormatError, "18446744073709551615");
  EXPECT_ERROR(open(with("block_count", raw<int32_t>(-1), 5)), FormatError, "natural number");
  EXPECT_ERROR(open(with("block_count", GgufBuilder::text("many"), 8)), FormatError, "natural number");
  EXPECT_ERROR(open(with("attention.layer_norm_rms_epsilon", raw(std::nanf("")), 6)), FormatError, "finite");
  EXPECT_ERROR(open(with("rope.freq_base", raw(INFINITY), 6)), FormatError, "finite");
  EXPECT_ERROR(open(metadata("llama").tensor("blk.0.attn_q.weight", {1, 6}, count_from(0, 6))), FormatError, "q_proj",
               "6 rows", "multiple of 2 x 2");
}

}  // namespace
}  // namespace moesaic::models
