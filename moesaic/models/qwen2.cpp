// Qwen 2 and 2.5: biases on q, k and v.
#include "moesaic/models/families.h"

namespace moesaic::models {

void read_qwen_windows(ConfigReader& reader, DecoderConfig& config, Slides slides) {
  int64_t window = 0;
  if (reader.flag("use_sliding_window", false) &&
      (!reader.mentions("sliding_window") || reader.has("sliding_window"))) {
    window = reader.size("sliding_window", 4096, int64_t{1} << 30);
  }
  int64_t layers = 28;
  if (reader.has("max_window_layers") && reader.json().at("max_window_layers") != 0) {
    layers = reader.size("max_window_layers", std::nullopt, int64_t{1} << 30);
  } else if (reader.has("max_window_layers")) {
    layers = 0;
  }
  const auto sliding = read_layer_types(reader, config, [&](int64_t i) { return window > 0 && slides(i, layers); });
  if (std::find(sliding.begin(), sliding.end(), 1) == sliding.end()) return;
  if (window == 0)
    reader.error("layer_types", "has sliding_attention, but use_sliding_window is off or there is no sliding_window");
  config.sliding_window = window;
  config.layer_is_sliding = sliding;
}

DecoderConfig parse_qwen2(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 151'936,
               .hidden_size = 4096,
               .intermediate_size = 22'016,
               .num_layers = 32,
               .num_heads = 32,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(32),
               .max_position = 32'768});
  config.qkv_bias = true;
  config.rope = read_flat_rope(reader, config);
  read_qwen_windows(reader, config, slides_from);
  return config;
}

DecoderConfig parse_qwen2_moe(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 151'936,
               .hidden_size = 2048,
               .intermediate_size = 5632,
               .num_layers = 24,
               .num_heads = 16,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(16),
               .max_position = 32'768});
  config.qkv_bias = reader.flag("qkv_bias", true);
  config.rope = read_flat_rope(reader, config);
  // Every second layer below max_window_layers.
  read_qwen_windows(reader, config,
                    [](int64_t i, int64_t max_window_layers) { return (i + 1) % 2 != 0 && i < max_window_layers; });
  config.sparse = read_sparse(reader, config,
                              {.experts = 60,
                               .top_k = 4,
                               .width_key = "moe_intermediate_size",
                               .width = 1408,
                               .shared_width_key = "shared_expert_intermediate_size",
                               .shared_width = 5632,
                               .has_norm_topk_prob = true,
                               .may_mix = true});
  config.sparse->shared_gate = true;
  return config;
}

const formats::GgufArchitecture kQwen2MoeGguf = {
    .name = "qwen2moe",
    .norms = kPreNorms,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "qwen2_moe";
          config["architectures"] = {"Qwen2MoeForCausalLM"};
          config["hidden_act"] = "silu";
          config["norm_topk_prob"] = false;  // llama.cpp's rule for it
          complete_sparse(metadata, config);
        },
};

const formats::GgufArchitecture kQwen2Gguf = {
    .name = "qwen2",
    .norms = kPreNorms,
    .complete =
        [](const formats::GgufMetadata&, Json& config) {
          config["model_type"] = "qwen2";
          config["architectures"] = {"Qwen2ForCausalLM"};
          config["hidden_act"] = "silu";
        },
};

}  // namespace moesaic::models
