// T5 (1.0, 1.1, LM-adapted, Flan-T5, T0), mT5 and umT5.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

struct T5Defaults {
  int64_t vocab_size, intermediate_size, num_layers, num_heads;
  const char* feed_forward;
};

Seq2SeqConfig read_t5(ConfigReader& reader, const T5Defaults& defaults) {
  constexpr int64_t kMaxVocabulary = 1 << 24, kMaxWidth = 1 << 18, kMaxLayers = 10'000, kMaxHeads = 1 << 14;
  Seq2SeqConfig config;
  config.model_type = reader.text("model_type", "");
  config.vocab_size = reader.size("vocab_size", defaults.vocab_size, kMaxVocabulary);
  config.hidden_size = reader.size("d_model", 512, kMaxWidth);
  config.intermediate_size = reader.size("d_ff", defaults.intermediate_size, 4 * kMaxWidth);
  config.head_dim = reader.size("d_kv", 64, kMaxWidth);
  config.num_heads = reader.size("num_heads", defaults.num_heads, kMaxHeads);
  config.encoder_layers = reader.size("num_layers", defaults.num_layers, kMaxLayers);
  config.decoder_layers = reader.size("num_decoder_layers", config.encoder_layers, kMaxLayers);
  config.buckets = reader.size("relative_attention_num_buckets", 32, kMaxVocabulary);
  config.max_distance = reader.size("relative_attention_max_distance", 128, kMaxVocabulary);
  if (config.buckets < 4) {
    reader.error("relative_attention_num_buckets", fmt::format("got {}, expected 4 or more", config.buckets));
  } else if (config.max_distance <= config.buckets / 2) {
    reader.error("relative_attention_max_distance",
                 fmt::format("got {}, expected more than half of the {} buckets", config.max_distance, config.buckets));
  }
  config.norm_eps = reader.positive("layer_norm_epsilon", 1e-6);
  const std::string form = reader.text("feed_forward_proj", defaults.feed_forward);
  config.gated = form.starts_with("gated-");
  const std::string activation = config.gated ? form.substr(6) : form;
  if (form == "gated-gelu" || activation == "gelu_new") {
    config.activation = Activation::kGeluTanh;
  } else if (activation == "silu" || activation == "swish") {
    config.activation = Activation::kSilu;
  } else if (activation != "relu") {
    reader.error("feed_forward_proj", fmt::format("got \"{}\", expected relu, gated-gelu or gated-silu", form));
  }
  // Prompts are tokenised by it too, so it is no default.
  if (!reader.has("is_encoder_decoder")) {
    reader.error("is_encoder_decoder", "is missing, expected true");
  } else if (!reader.flag("is_encoder_decoder", true)) {
    reader.error("is_encoder_decoder", "got false, expected true: half of a T5 is not supported");
  }
  // Of a model's config alone; where there are weights, they decide.
  config.tie_word_embeddings = reader.flag("tie_word_embeddings", true);
  config.eos_ids = reader.ids("eos_token_id", {1});
  const auto pad = reader.ids("pad_token_id", {0});
  const auto start = reader.ids("decoder_start_token_id", pad);
  config.start_id = start.empty() ? 0 : start.front();
  if (config.start_id >= config.vocab_size) {
    reader.error("decoder_start_token_id",
                 fmt::format("got {}, expected less than vocab_size {}", config.start_id, config.vocab_size));
  }
  return config;
}

}  // namespace

Seq2SeqConfig parse_t5(ConfigReader& reader) {
  Seq2SeqConfig config = read_t5(reader, {32'128, 2048, 6, 8, "relu"});
  // transformers 5 writes `tie_word_embeddings: true` whatever the model is, and this key beside it.
  config.scale_output = reader.flag("scale_decoder_outputs", config.tie_word_embeddings);
  if (!config.scale_output) config.tie_word_embeddings = false;
  return config;
}

Seq2SeqConfig parse_mt5(ConfigReader& reader) {
  Seq2SeqConfig config = read_t5(reader, {250'112, 1024, 8, 6, "gated-gelu"});
  config.scale_output = false;
  return config;
}

/// Differs: transformers 5 divides the decoder's states by sqrt(d) even where the file says that embedding and head are
/// not tied; umT5 was trained without, and transformers 4 did not.
Seq2SeqConfig parse_umt5(ConfigReader& reader) {
  Seq2SeqConfig config = read_t5(reader, {250'112, 1024, 8, 6, "gated-gelu"});
  config.bias_per_layer = true;
  config.scale_output = config.tie_word_embeddings;
  return config;
}

}  // namespace moesaic::models
