// Granite's sparse models: multipliers on embedding, attention, residual stream and logits; a shared expert in some.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

DecoderConfig parse(ConfigReader& reader, const SparseDefaults& defaults) {
  DecoderConfig config = read_common(reader, {.vocab_size = 32'000,
                                              .hidden_size = 4096,
                                              .intermediate_size = 11'008,
                                              .num_layers = 32,
                                              .num_heads = 32,
                                              .max_position = 2048,
                                              .eos_ids = {2},
                                              .bos_id = 1});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.embedding_scale = reader.positive("embedding_multiplier", 1.0);
  config.query_scale = reader.positive("attention_multiplier", 1.0);
  config.residual_scale = reader.positive("residual_multiplier", 1.0);
  config.logit_scale = 1.0 / reader.positive("logits_scaling", 1.0);
  config.rope = read_flat_rope(reader, config);
  config.sparse = read_sparse(reader, config, defaults);
  return config;
}

}  // namespace

DecoderConfig parse_granitemoe(ConfigReader& reader) { return parse(reader, {.width = 11'008}); }

DecoderConfig parse_granitemoeshared(ConfigReader& reader) {
  return parse(reader, {.width = 11'008, .shared_width_key = "shared_intermediate_size"});
}

const formats::GgufArchitecture kGraniteMoeGguf = {
    .name = "granitemoe",
    .norms = kPreNorms,
    .interleaved_heads = true,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          const int64_t shared = metadata.find_size("expert_shared_feed_forward_length").value_or(0);
          config["model_type"] = shared > 0 ? "granitemoeshared" : "granitemoe";
          config["architectures"] = {shared > 0 ? "GraniteMoeSharedForCausalLM" : "GraniteMoeForCausalLM"};
          config["hidden_act"] = "silu";
          config["shared_intermediate_size"] = shared;
          config["attention_bias"] = metadata.has_tensor("blk.0.attn_q.bias");
          for (const auto& [key, gguf] : {std::pair{"embedding_multiplier", "embedding_scale"},
                                          {"attention_multiplier", "attention.scale"},
                                          {"residual_multiplier", "residual_scale"},
                                          {"logits_scaling", "logit_scale"}}) {
            if (const auto value = metadata.find_number(gguf)) config[key] = *value;
          }
          complete_sparse(metadata, config);
        },
};

}  // namespace moesaic::models
