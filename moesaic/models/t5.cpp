// T5 (1.0, 1.1, LM-adapted, Flan-T5, T0), mT5, umT5 and Switch.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

struct T5Defaults {
  int64_t vocab_size, intermediate_size, num_layers, num_heads;
  const char* feed_forward;
  int64_t hidden_size = 512;
  const char* feed_forward_key = "feed_forward_proj";
};

Seq2SeqConfig read_t5(ConfigReader& reader, const T5Defaults& defaults) {
  constexpr int64_t kMaxVocabulary = 1 << 24, kMaxWidth = 1 << 18, kMaxLayers = 10'000, kMaxHeads = 1 << 14;
  Seq2SeqConfig config;
  config.model_type = reader.text("model_type", "");
  config.vocab_size = reader.size("vocab_size", defaults.vocab_size, kMaxVocabulary);
  config.hidden_size = reader.size("d_model", defaults.hidden_size, kMaxWidth);
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
  const std::string form = reader.text(defaults.feed_forward_key, defaults.feed_forward);
  config.gated = form.starts_with("gated-");
  const std::string activation = config.gated ? form.substr(6) : form;
  if (form == "gated-gelu" || activation == "gelu_new") {
    config.activation = Activation::kGeluTanh;
  } else if (activation == "silu" || activation == "swish") {
    config.activation = Activation::kSilu;
  } else if (activation != "relu") {
    reader.error(defaults.feed_forward_key, fmt::format("got \"{}\", expected relu, gated-gelu or gated-silu", form));
  }
  const Json architectures = reader.json().value("architectures", Json());
  config.encoder_alone = architectures.is_array() && !architectures.empty() && architectures[0].is_string() &&
                         architectures[0].get_ref<const std::string&>().ends_with("EncoderModel");
  if (config.encoder_alone) config.decoder_layers = 0;
  // Prompts are tokenised by it too, so it is no default. Of an encoder alone transformers 5 writes false, 4 true.
  if (!config.encoder_alone && !reader.has("is_encoder_decoder")) {
    reader.error("is_encoder_decoder", "is missing, expected true");
  } else if (!config.encoder_alone && !reader.flag("is_encoder_decoder", true)) {
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

/// Which layers of a half have experts. As transformers reads it, none means one: the second.
std::vector<uint8_t> read_sparse_layers(ConfigReader& reader, const char* key, int64_t layers) {
  constexpr int64_t kDefault = 3;
  const bool none = reader.has(key) && reader.json().at(key) == 0;
  const int64_t step = none ? layers : layers / reader.size(key, std::min(kDefault, layers), layers);
  std::vector<uint8_t> sparse(layers);
  for (int64_t i = 0; i < layers; ++i) sparse[i] = step == 1 || i % step == 1;
  return sparse;
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

/// A gated network has no form in transformers' experts.
Seq2SeqConfig parse_switch(ConfigReader& reader) {
  constexpr int64_t kMaxExperts = 1 << 16, kMaxCapacity = int64_t{1} << 30;
  Seq2SeqConfig config = read_t5(reader, {32'128, 2048, 12, 12, "relu", 768, "dense_act_fn"});
  if (config.gated) reader.error("dense_act_fn", "got a gated one, expected relu: an expert has no gate");
  if (reader.flag("router_bias", false)) reader.error("router_bias", "got true, expected false");
  config.scale_output = config.tie_word_embeddings;
  Seq2SeqConfig::Switch sparse;
  sparse.experts = reader.size("num_experts", 8, kMaxExperts);
  sparse.capacity = reader.size("expert_capacity", 64, kMaxCapacity);
  sparse.jitter = reader.has("router_jitter_noise") && reader.json().at("router_jitter_noise") == 0
                      ? 0.0
                      : reader.positive("router_jitter_noise", 0.01);
  sparse.in_encoder = read_sparse_layers(reader, "num_sparse_encoder_layers", config.encoder_layers);
  sparse.in_decoder = read_sparse_layers(reader, "num_sparse_decoder_layers", config.decoder_layers);
  config.sparse = sparse;
  return config;
}

}  // namespace moesaic::models
