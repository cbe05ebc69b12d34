// Gemma 1 and 2: scaled embeddings and norms that multiply by 1 + weight. Gemma 2 adds norms behind both halves of a
// layer, soft caps, and a window in every second layer.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

/// What both have. Files say `hidden_act: gelu` and mean its tanh approximation, which `hidden_activation` names.
DecoderConfig read_gemma(ConfigReader& reader, FamilyDefaults defaults) {
  defaults.vocab_size = 256'000;
  defaults.head_dim = 256;
  defaults.max_position = 8192;
  defaults.tie_word_embeddings = true;
  defaults.eos_ids = {1};
  defaults.bos_id = 2;
  defaults.activation_key = "hidden_activation";
  defaults.activation = "gelu_pytorch_tanh";
  DecoderConfig config = read_common(reader, defaults);
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.norm_plus_one = true;
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  config.rope = read_flat_rope(reader, config);
  if (reader.flag("use_bidirectional_attention", false)) {
    reader.error("use_bidirectional_attention", "got true, expected false: only causal attention is supported");
  }
  return config;
}

}  // namespace

DecoderConfig parse_gemma(ConfigReader& reader) {
  return read_gemma(
      reader,
      {.hidden_size = 3072, .intermediate_size = 24'576, .num_layers = 28, .num_heads = 16, .num_kv_heads = 16});
}

DecoderConfig parse_gemma2(ConfigReader& reader) {
  DecoderConfig config = read_gemma(
      reader, {.hidden_size = 2304, .intermediate_size = 9216, .num_layers = 26, .num_heads = 8, .num_kv_heads = 4});
  config.pre_post_norms = true;
  config.query_scale = 1.0 / std::sqrt(reader.positive("query_pre_attn_scalar", 256.0));
  auto cap = [&](const char* key, double fallback) {
    return reader.mentions(key) ? reader.positive_or_off(key) : fallback;
  };
  config.attention_softcap = cap("attn_logit_softcapping", 50.0);
  config.final_softcap = cap("final_logit_softcapping", 30.0);
  config.layer_is_sliding = read_layer_types(reader, config, [](int64_t layer) { return layer % 2 == 0; });
  if (!reader.mentions("sliding_window") || reader.has("sliding_window")) {
    config.sliding_window = reader.size("sliding_window", 4096, int64_t{1} << 30);
  }
  return config;
}

void complete_gemma(const formats::GgufMetadata& metadata, Json& config, int64_t layers_of_27b) {
  config["hidden_activation"] = "gelu_pytorch_tanh";
  if (const auto window = metadata.find_size("attention.sliding_window")) config["sliding_window"] = *window;
  const auto hidden = config["hidden_size"].get<int64_t>(), heads = config["num_attention_heads"].get<int64_t>();
  config["query_pre_attn_scalar"] =
      config["num_hidden_layers"] == layers_of_27b ? Json(hidden / heads) : config["head_dim"];
  if (const auto cap = metadata.find_number("attn_logit_softcapping")) config["attn_logit_softcapping"] = *cap;
  if (const auto cap = metadata.find_number("final_logit_softcapping")) config["final_logit_softcapping"] = *cap;
}

const formats::GgufArchitecture kGemmaGguf = {
    .name = "gemma",
    .norms = kPreNorms,
    .norms_plus_one = true,
    .complete =
        [](const formats::GgufMetadata&, Json& config) {
          config["model_type"] = "gemma";
          config["architectures"] = {"GemmaForCausalLM"};
          config["hidden_activation"] = "gelu_pytorch_tanh";
        },
};

const formats::GgufArchitecture kGemma2Gguf = {
    .name = "gemma2",
    .norms = kPrePostNorms,
    .norms_plus_one = true,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "gemma2";
          config["architectures"] = {"Gemma2ForCausalLM"};
          complete_gemma(metadata, config, 46);
        },
};

}  // namespace moesaic::models
