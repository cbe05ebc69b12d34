// Qwen 3: per-head norms on queries and keys, head_dim apart from hidden_size / heads.
#include "moesaic/models/families.h"

namespace moesaic::models {

DecoderConfig parse_qwen3(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 151'936,
               .hidden_size = 4096,
               .intermediate_size = 22'016,
               .num_layers = 32,
               .num_heads = 32,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(32),
               .head_dim = 128,
               .max_position = 32'768});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.qk_norm = true;
  config.rope = read_flat_rope(reader, config);
  read_qwen_windows(reader, config, slides_from);
  return config;
}

DecoderConfig parse_qwen3_moe(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 151'936,
               .hidden_size = 2048,
               .intermediate_size = 6144,
               .num_layers = 24,
               .num_heads = 32,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(4),
               .max_position = 32'768});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.qk_norm = true;
  config.rope = read_flat_rope(reader, config);
  if (reader.flag("use_sliding_window", false)) {
    config.sliding_window = reader.size("sliding_window", 4096, int64_t{1} << 30);
  }
  config.sparse = read_sparse(reader, config,
                              {.experts = 128,
                               .top_k = 8,
                               .width_key = "moe_intermediate_size",
                               .width = 768,
                               .has_norm_topk_prob = true,
                               .may_mix = true});
  return config;
}

const formats::GgufArchitecture kQwen3MoeGguf = {
    .name = "qwen3moe",
    .norms = kPreNorms,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "qwen3_moe";
          config["architectures"] = {"Qwen3MoeForCausalLM"};
          config["hidden_act"] = "silu";
          config["attention_bias"] = metadata.has_tensor("blk.0.attn_q.bias");
          config["norm_topk_prob"] = true;  // llama.cpp's rule for it
          complete_sparse(metadata, config);
        },
};

const formats::GgufArchitecture kQwen3Gguf = {
    .name = "qwen3",
    .norms = kPreNorms,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "qwen3";
          config["architectures"] = {"Qwen3ForCausalLM"};
          config["hidden_act"] = "silu";
          config["attention_bias"] = metadata.has_tensor("blk.0.attn_q.bias");
        },
};

}  // namespace moesaic::models
