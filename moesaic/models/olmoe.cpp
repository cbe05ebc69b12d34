// OLMoE: many small experts; norms over all heads of queries and of keys.
#include "moesaic/models/families.h"

namespace moesaic::models {

DecoderConfig parse_olmoe(ConfigReader& reader) {
  DecoderConfig config = read_common(reader, {.vocab_size = 50'304,
                                              .hidden_size = 2048,
                                              .intermediate_size = 2048,
                                              .num_layers = 16,
                                              .num_heads = 16,
                                              .max_position = 4096,
                                              .rms_norm_eps = 1e-5,
                                              .eos_ids = {50'279}});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.qk_norm = config.flat_qk_norm = true;
  config.clip_qkv = reader.positive_or_off("clip_qkv");
  config.rope = read_flat_rope(reader, config);
  config.sparse = read_sparse(reader, config, {.experts = 64, .top_k = 8, .width = 2048, .has_norm_topk_prob = true});
  return config;
}

const formats::GgufArchitecture kOlmoeGguf = {
    .name = "olmoe",
    .norms = kPreNorms,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          config["model_type"] = "olmoe";
          config["architectures"] = {"OlmoeForCausalLM"};
          config["hidden_act"] = "silu";
          config["norm_topk_prob"] = false;  // llama.cpp's rule for it
          complete_sparse(metadata, config);
        },
};

}  // namespace moesaic::models
