#include "moesaic/models/config_reader.h"

#include <functional>

#include "moesaic/formats/config.h"

namespace moesaic::models {
namespace {

constexpr int64_t kMaxVocabulary = 1 << 24, kMaxWidth = 1 << 18, kMaxLayers = 10'000, kMaxHeads = 1 << 14;
constexpr int64_t kMaxPosition = int64_t{1} << 30;
constexpr int64_t kMaxExperts = 1 << 14;

std::string shown(const Json& value) { return value.dump().substr(0, 80); }

std::optional<double> finite_number(const Json& value) {
  if (!value.is_number()) return std::nullopt;
  const double number = value.get<double>();
  return std::isfinite(number) ? std::optional(number) : std::nullopt;
}

/// An integer, also one written as 4096.0.
std::optional<int64_t> whole_number(const Json& value) {
  const auto number = finite_number(value);
  if (!number || *number != std::floor(*number) || std::abs(*number) > 1e15) return std::nullopt;
  return static_cast<int64_t>(*number);
}

}  // namespace

void ConfigReader::error(const std::string& key, const std::string& message) {
  errors_.push_back(fmt::format("'{}': {}", key, message));
}

int64_t ConfigReader::size(const char* key, std::optional<int64_t> fallback, int64_t max) {
  if (!has(key)) {
    if (!fallback) error(key, "is missing");
    return fallback.value_or(1);
  }
  const auto value = whole_number(json_.at(key));
  if (value && *value >= 1 && *value <= max) return *value;
  error(key, fmt::format("got {}, expected an integer from 1 to {}", shown(json_.at(key)), max));
  return 1;
}

double ConfigReader::positive(const char* key, double fallback) {
  if (!has(key)) return fallback;
  const auto value = finite_number(json_.at(key));
  if (value && *value > 0) return *value;
  error(key, fmt::format("got {}, expected a number above 0", shown(json_.at(key))));
  return fallback;
}

double ConfigReader::positive_or_off(const char* key) { return has(key) ? positive(key, 1.0) : 0.0; }

bool ConfigReader::flag(const char* key, bool fallback) {
  if (!has(key)) return fallback;
  if (json_.at(key).is_boolean()) return json_.at(key).get<bool>();
  error(key, fmt::format("got {}, expected true or false", shown(json_.at(key))));
  return fallback;
}

std::string ConfigReader::text(const char* key, const std::string& fallback) {
  if (!has(key)) return fallback;
  if (json_.at(key).is_string()) return json_.at(key).get<std::string>();
  error(key, fmt::format("got {}, expected a string", shown(json_.at(key))));
  return fallback;
}

std::vector<int64_t> ConfigReader::ids(const char* key, std::vector<int64_t> fallback) {
  if (!mentions(key)) return fallback;
  const Json& value = json_.at(key);
  if (value.is_null()) return {};
  std::vector<int64_t> found;
  for (const Json& item : value.is_array() ? value : Json::array({value})) {
    const auto id = whole_number(item);
    if (!id || *id < -1 || *id >= kMaxVocabulary) {
      error(key, fmt::format("got {}, expected a token id or a list of them", shown(value)));
      return fallback;
    }
    if (*id >= 0) found.push_back(*id);  // some files write -1 for "none"
  }
  return found;
}

void ConfigReader::finish() const {
  MOESAIC_CHECK(errors_.empty(), ConfigError, "{}: {} wrong value{}:\n  {}", where_, errors_.size(),
                errors_.size() == 1 ? "" : "s", fmt::join(errors_, "\n  "));
}

DecoderConfig read_common(ConfigReader& reader, const FamilyDefaults& defaults) {
  DecoderConfig config;
  config.model_type = reader.text("model_type", "");
  config.vocab_size = reader.size("vocab_size", defaults.vocab_size, kMaxVocabulary);
  config.hidden_size = reader.size("hidden_size", defaults.hidden_size, kMaxWidth);
  config.intermediate_size = reader.size("intermediate_size", defaults.intermediate_size, 4 * kMaxWidth);
  config.num_layers = reader.size("num_hidden_layers", defaults.num_layers, kMaxLayers);
  config.num_heads = reader.size("num_attention_heads", defaults.num_heads, kMaxHeads);
  config.num_kv_heads = reader.size("num_key_value_heads", defaults.num_kv_heads.value_or(config.num_heads), kMaxHeads);
  if (config.num_heads % config.num_kv_heads != 0) {
    reader.error("num_key_value_heads", fmt::format("got {}, expected a divisor of num_attention_heads {}",
                                                    config.num_kv_heads, config.num_heads));
  }
  const int64_t derived = config.hidden_size / config.num_heads;
  if (!reader.has("head_dim") && !defaults.head_dim && (derived * config.num_heads != config.hidden_size)) {
    reader.error("hidden_size", fmt::format("got {}, expected a multiple of num_attention_heads {}", config.hidden_size,
                                            config.num_heads));
  }
  config.head_dim = reader.size("head_dim", defaults.head_dim.value_or(std::max<int64_t>(derived, 1)), kMaxWidth);
  if (config.head_dim % 2 != 0) {
    reader.error("head_dim",
                 fmt::format("got {}, expected an even number (rotary positions pair them)", config.head_dim));
  }
  config.max_position = reader.size("max_position_embeddings", defaults.max_position, kMaxPosition);
  config.rms_norm_eps = reader.positive("rms_norm_eps", defaults.rms_norm_eps);
  config.tie_word_embeddings = reader.flag("tie_word_embeddings", defaults.tie_word_embeddings);
  const std::string activation = reader.text(defaults.activation_key, defaults.activation);
  if (activation == "gelu_pytorch_tanh") {
    config.activation = Activation::kGeluTanh;
  } else if (activation != "silu" && activation != "swish") {
    reader.error(defaults.activation_key, fmt::format("got \"{}\", expected silu or gelu_pytorch_tanh", activation));
  }
  config.eos_ids = reader.ids("eos_token_id", defaults.eos_ids);
  const auto bos =
      reader.ids("bos_token_id", defaults.bos_id >= 0 ? std::vector{defaults.bos_id} : std::vector<int64_t>{});
  config.bos_id = bos.empty() ? -1 : bos.front();
  return config;
}

RopeConfig read_rope(ConfigReader& reader, const Json& rope, const std::string& name, double theta,
                     const DecoderConfig& config) {
  RopeConfig result;
  result.theta = theta;
  if (reader.has(formats::kRopeMagnitude)) result.attention_factor = reader.positive(formats::kRopeMagnitude, 1.0);
  if (!rope.is_object()) {
    reader.error(name, fmt::format("got {}, expected an object", shown(rope)));
    return result;
  }
  auto has = [&](const char* key) { return rope.contains(key) && !rope.at(key).is_null(); };
  auto number = [&](const char* key, double& value, double low) {
    if (!has(key)) return;
    const auto got = finite_number(rope.at(key));
    if (got && *got > low) {
      value = *got;
    } else {
      reader.error(name + "." + key, fmt::format("got {}, expected a number above {}", shown(rope.at(key)), low));
    }
  };
  if (has("rope_type")) {
    const Json& type = rope.at("rope_type");
    const std::vector<std::string> known{"default", "linear", "dynamic", "llama3", "yarn"};
    if (!type.is_string() || std::find(known.begin(), known.end(), type.get<std::string>()) == known.end()) {
      reader.error(name + ".rope_type", fmt::format("got {}, expected one of {}", shown(type), fmt::join(known, ", ")));
      return result;
    }
    result.type = type.get<std::string>();
  }
  number("rope_theta", result.theta, result.type == "yarn" ? 1.0 : 0.0);
  double partial = 1.0;
  number("partial_rotary_factor", partial, 0.0);
  if (partial != 1.0) {
    reader.error(name + ".partial_rotary_factor", fmt::format("got {}, expected 1 (whole heads rotate)", partial));
  }
  if (result.type == "default") return result;

  if (!has("factor") && result.type != "yarn") reader.error(name + ".factor", "is missing");
  number("factor", result.factor, 0.0);
  result.original_max_position = config.max_position;
  // transformers scales `dynamic` from max_position_embeddings, whatever the rope object says.
  if (has("original_max_position_embeddings") && result.type != "dynamic") {
    const auto value = whole_number(rope.at("original_max_position_embeddings"));
    if (value && *value >= 1 && *value <= kMaxPosition) {
      result.original_max_position = *value;
    } else {
      reader.error(name + ".original_max_position_embeddings",
                   fmt::format("got {}, expected an integer from 1 to {}",
                               shown(rope.at("original_max_position_embeddings")), kMaxPosition));
    }
  }
  if (result.type == "dynamic" && config.head_dim <= 2) reader.error(name, "dynamic scaling needs a head_dim above 2");
  if (result.type == "llama3") {
    number("low_freq_factor", result.low_freq_factor, 0.0);
    number("high_freq_factor", result.high_freq_factor, 0.0);
    if (result.high_freq_factor <= result.low_freq_factor) {
      reader.error(name + ".high_freq_factor", fmt::format("got {}, expected more than low_freq_factor {}",
                                                           result.high_freq_factor, result.low_freq_factor));
    }
  }
  if (result.type == "yarn") {
    if (!has("factor")) {
      result.factor = static_cast<double>(config.max_position) / static_cast<double>(result.original_max_position);
    }
    number("beta_fast", result.beta_fast, 0.0);
    number("beta_slow", result.beta_slow, 0.0);
    number("attention_factor", result.attention_factor, 0.0);
    if (has("mscale") && has("mscale_all_dim")) {
      number("mscale", result.mscale, -1.0);
      number("mscale_all_dim", result.mscale_all_dim, -1.0);
    }
    if (has("truncate")) {
      if (rope.at("truncate").is_boolean()) {
        result.truncate = rope.at("truncate").get<bool>();
      } else {
        reader.error(name + ".truncate", fmt::format("got {}, expected true or false", shown(rope.at("truncate"))));
      }
    }
  }
  return result;
}

RopeConfig read_flat_rope(ConfigReader& reader, const DecoderConfig& config, double theta) {
  return read_rope(reader, reader.json().at("rope_parameters"), "rope_parameters", theta, config);
}

SparseConfig read_sparse(ConfigReader& reader, const DecoderConfig& config, const SparseDefaults& defaults) {
  SparseConfig sparse;
  const char* experts_key = reader.has("num_experts") ? "num_experts" : "num_local_experts";
  sparse.experts = reader.size(experts_key, defaults.experts, kMaxExperts);
  if (reader.has("num_experts") && reader.has("num_local_experts") &&
      reader.size("num_local_experts", std::nullopt, kMaxExperts) != sparse.experts) {
    reader.error("num_local_experts", fmt::format("got {}, expected num_experts' {}",
                                                  shown(reader.json().at("num_local_experts")), sparse.experts));
  }
  sparse.top_k = reader.size("num_experts_per_tok", defaults.top_k, kMaxExperts);
  if (sparse.top_k > sparse.experts) {
    reader.error("num_experts_per_tok",
                 fmt::format("got {}, expected at most {} {}", sparse.top_k, experts_key, sparse.experts));
    sparse.top_k = sparse.experts;
  }
  sparse.width = reader.size(defaults.width_key, defaults.width, 4 * kMaxWidth);
  if (defaults.shared_width_key != nullptr) {
    const bool none = reader.has(defaults.shared_width_key) && reader.json().at(defaults.shared_width_key) == 0;
    const bool given = reader.has(defaults.shared_width_key) || defaults.shared_width > 0;
    if (given && !none) {
      sparse.shared_width = reader.size(defaults.shared_width_key, defaults.shared_width, 4 * kMaxWidth);
    }
  }
  sparse.renormalize = defaults.has_norm_topk_prob ? reader.flag("norm_topk_prob", false) : defaults.renormalize;
  sparse.names = *formats::expert_names(config.model_type);
  if (!defaults.may_mix) return sparse;
  const int64_t step = reader.size("decoder_sparse_step", 1, kMaxLayers);
  const std::vector<int64_t> dense = reader.ids("mlp_only_layers", {});
  std::vector<uint8_t> layers(config.num_layers, 0);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    layers[i] = (i + 1) % step != 0 || std::find(dense.begin(), dense.end(), i) != dense.end();
  }
  if (std::find(layers.begin(), layers.end(), 1) != layers.end()) sparse.layer_is_dense = layers;
  return sparse;
}

std::vector<uint8_t> read_layer_types(ConfigReader& reader, const DecoderConfig& config,
                                      const std::function<bool(int64_t)>& is_sliding) {
  std::vector<uint8_t> sliding(config.num_layers, 0);
  if (!reader.has("layer_types")) {
    for (int64_t i = 0; i < config.num_layers; ++i) sliding[i] = is_sliding(i);
    return sliding;
  }
  const Json& types = reader.json().at("layer_types");
  if (!types.is_array() || static_cast<int64_t>(types.size()) != config.num_layers) {
    reader.error("layer_types", fmt::format("got {}, expected a list of {} names", shown(types), config.num_layers));
    return sliding;
  }
  for (int64_t i = 0; i < config.num_layers; ++i) {
    sliding[i] = types[i] == "sliding_attention";
    if (!sliding[i] && types[i] != "full_attention") {
      reader.error("layer_types", fmt::format("got {} for layer {}, expected full_attention or sliding_attention",
                                              shown(types[i]), i));
      return sliding;
    }
  }
  return sliding;
}

}  // namespace moesaic::models
