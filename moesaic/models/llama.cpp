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

// A mistral is a llama with a window there, a mixtral one with experts.
const formats::GgufArchitecture kLlamaGguf = {
    .name = "llama",
    .norms = kPreNorms,
    .interleaved_heads = true,
    .complete =
        [](const formats::GgufMetadata& metadata, Json& config) {
          const int64_t window = metadata.find_size("attention.sliding_window").value_or(0);
          const bool sparse = metadata.find_size("expert_count").value_or(0) > 0;
          config["model_type"] = sparse ? "mixtral" : window > 0 ? "mistral" : "llama";
          config["architectures"] = {sparse       ? "MixtralForCausalLM"
                                     : window > 0 ? "MistralForCausalLM"
                                                  : "LlamaForCausalLM"};
          if (window > 0) config["sliding_window"] = window;
          if (sparse) complete_sparse(metadata, config);
          config["hidden_act"] = "silu";
          config["attention_bias"] = metadata.has_tensor("blk.0.attn_q.bias");
          config["mlp_bias"] = metadata.has_tensor("blk.0.ffn_up.bias");
        },
};

}  // namespace moesaic::models
