// Llama 2 and 3, SmolLM2 and others of that build.
#include "moesaic/models/families.h"

namespace moesaic::models {

DecoderConfig parse_llama(ConfigReader& reader) {
  DecoderConfig config = read_common(reader, {.vocab_size = 32'000,
                                              .hidden_size = 4096,
                                              .intermediate_size = 11'008,
                                              .num_layers = 32,
                                              .num_heads = 32,
                                              .max_position = 2048,
                                              .eos_ids = {2},
                                              .bos_id = 1});
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.mlp_bias = reader.flag("mlp_bias", false);
  config.rope = read_flat_rope(reader, config);
  return config;
}

}  // namespace moesaic::models
