// Gemma 3, text part: scaled embeddings, norms that multiply by 1 + weight before and after each half, local (sliding)
// and global layers with a rope base each, soft caps where configured.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

/// The rope object of one kind of layer; one that is not by kind is that of the full ones.
RopeConfig read_kind(ConfigReader& reader, const char* kind, double theta, const DecoderConfig& config) {
  const Json& rope = reader.json().at("rope_parameters");
  if (rope.contains(kind))
    return read_rope(reader, rope.at(kind), std::string("rope_parameters.") + kind, theta, config);
  const bool flat = !rope.contains("full_attention") && std::string_view(kind) == "full_attention";
  return read_rope(reader, flat ? rope : Json::object(), "rope_parameters", theta, config);
}

}  // namespace

DecoderConfig parse_gemma3(ConfigReader& reader) {
  DecoderConfig config = read_common(reader, {.vocab_size = 262'208,
                                              .hidden_size = 2304,
                                              .intermediate_size = 9216,
                                              .num_layers = 26,
                                              .num_heads = 8,
                                              .num_kv_heads = 4,
                                              .head_dim = 256,
                                              .max_position = 131'072,
                                              .tie_word_embeddings = true,
                                              .eos_ids = {1},
                                              .bos_id = 2,
                                              .activation_key = "hidden_activation",
                                              .activation = "gelu_pytorch_tanh"});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.qk_norm = true;
  config.norm_plus_one = true;
  config.pre_post_norms = true;
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  config.query_scale = 1.0 / std::sqrt(reader.positive("query_pre_attn_scalar", 256.0));
  config.attention_softcap = reader.positive_or_off("attn_logit_softcapping");
  config.final_softcap = reader.positive_or_off("final_logit_softcapping");
  if (reader.flag("use_bidirectional_attention", false)) {
    reader.error("use_bidirectional_attention", "got true, expected false: only causal attention is supported");
  }

  const int64_t pattern = reader.size("sliding_window_pattern", 6, int64_t{1} << 30);
  config.layer_is_sliding = read_layer_types(reader, config, [&](int64_t i) { return (i + 1) % pattern != 0; });
  const bool any_sliding =
      std::find(config.layer_is_sliding.begin(), config.layer_is_sliding.end(), 1) != config.layer_is_sliding.end();
  if (any_sliding) {
    if (reader.mentions("sliding_window") && !reader.has("sliding_window")) {
      reader.error("sliding_window", "got null, expected a size: layer_types has sliding_attention");
    }
    config.sliding_window = reader.size("sliding_window", 4096, int64_t{1} << 30);
  }

  config.rope = read_kind(reader, "full_attention", 1'000'000.0, config);
  config.rope_local = read_kind(reader, "sliding_attention", 10'000.0, config);
  return config;
}

const formats::GgufArchitecture kGemma3Gguf = {
    .name = "gemma3",
    .norms = kPrePostNorms,
    .norms_plus_one = true,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "gemma3_text";
          config["architectures"] = {"Gemma3ForCausalLM"};
          complete_gemma(metadata, config, 62);
          config["rope_local_base_freq"] = metadata.find_number("rope.freq_base_swa").value_or(10'000.0);
        },
};

}  // namespace moesaic::models
