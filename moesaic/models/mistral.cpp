// Mistral: Llama with a sliding window in every layer.
#include "moesaic/models/families.h"

namespace moesaic::models {

DecoderConfig parse_mistral(ConfigReader& reader) {
  DecoderConfig config = read_common(
      reader, {.vocab_size = 32'000,
               .hidden_size = 4096,
               .intermediate_size = 14'336,
               .num_layers = 32,
               .num_heads = 32,
               .num_kv_heads = reader.mentions("num_key_value_heads") ? std::nullopt : std::optional<int64_t>(8),
               .max_position = 4096 * 32,
               .eos_ids = {2},
               .bos_id = 1});
  config.rope = read_flat_rope(reader, config);
  // Absent means 4096; null means none.
  if (!reader.mentions("sliding_window") || reader.has("sliding_window")) {
    config.sliding_window = reader.size("sliding_window", 4096, int64_t{1} << 30);
  }
  return config;
}

}  // namespace moesaic::models
