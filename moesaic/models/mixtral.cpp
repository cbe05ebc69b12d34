// Mixtral: Mistral with eight feed-forward networks in every layer, two for each token.
#include "moesaic/models/families.h"

namespace moesaic::models {

DecoderConfig parse_mixtral(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 32'000,
               .hidden_size = 4096,
               .intermediate_size = 14'336,
               .num_layers = 32,
               .num_heads = 32,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(8),
               .max_position = 4096 * 32,
               .rms_norm_eps = 1e-5,
               .eos_ids = {2},
               .bos_id = 1});
  config.rope = read_flat_rope(reader, config, 1e6);
  if (reader.has("sliding_window")) {
    config.sliding_window = reader.size("sliding_window", std::nullopt, int64_t{1} << 30);
  }
  config.sparse = read_sparse(reader, config, {.width = 14'336});
  return config;
}

void complete_sparse(const formats::GgufMetadata& metadata, Json& config) {
  for (const auto& [key, gguf] : {std::pair{"num_experts", "expert_count"},
                                  {"num_local_experts", "expert_count"},
                                  {"num_experts_per_tok", "expert_used_count"},
                                  {"moe_intermediate_size", "expert_feed_forward_length"},
                                  {"shared_expert_intermediate_size", "expert_shared_feed_forward_length"}}) {
    if (const auto value = metadata.find_size(gguf)) config[key] = *value;
  }
}

}  // namespace moesaic::models
