#include "moesaic/formats/config.h"

namespace moesaic::formats {
namespace {

constexpr int64_t kMaxLayers = 10'000;
constexpr const char* kRopeTypes[] = {"linear", "dynamic", "llama3", "yarn", "longrope", "default"};

bool is_set(const Json& json, const char* key) { return json.contains(key) && !json.at(key).is_null(); }

/// json[key], removed from json; null when absent.
Json take(Json& json, const char* key) {
  Json value;
  if (auto it = json.find(key); it != json.end()) {
    value = std::move(*it);
    json.erase(it);
  }
  return value;
}

/// The language model's part of a multi-modal config.
Json take_text_config(Json& whole) {
  Json text = std::move(whole["text_config"]);
  for (const char* key :
       {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype"}) {
    if (is_set(whole, key) && !is_set(text, key)) text[key] = whole[key];
  }
  if (!is_set(text, "model_type") && whole.value("model_type", Json()) == "gemma3") text["model_type"] = "gemma3_text";
  return text;
}

void fill_gemma3_defaults(Json& config, const std::string& where) {
  const Json defaults = {{"vocab_size", 262208},
                         {"hidden_size", 2304},
                         {"intermediate_size", 9216},
                         {"num_hidden_layers", 26},
                         {"num_attention_heads", 8},
                         {"num_key_value_heads", 4},
                         {"head_dim", 256},
                         {"hidden_activation", "gelu_pytorch_tanh"},
                         {"rms_norm_eps", 1e-6},
                         {"max_position_embeddings", 131072},
                         {"sliding_window", 4096},
                         {"query_pre_attn_scalar", 256},
                         {"tie_word_embeddings", true}};
  for (const auto& [key, value] : defaults.items()) {
    if (!is_set(config, key.c_str())) config[key] = value;
  }
  if (is_set(config, "layer_types")) return;
  const int64_t layers = get<int64_t>(config, "num_hidden_layers", where);
  const int64_t pattern = get_or<int64_t>(config, "sliding_window_pattern", 6, where);
  MOESAIC_CHECK(
      layers > 0 && layers <= kMaxLayers && pattern > 0, ConfigError,
      "{}: got num_hidden_layers {} and sliding_window_pattern {}, expected 1 to {} layers and a pattern above 0",
      where, layers, pattern, kMaxLayers);
  Json types = Json::array();
  for (int64_t i = 0; i < layers; ++i) types.push_back((i + 1) % pattern == 0 ? "full_attention" : "sliding_attention");
  config["layer_types"] = std::move(types);
}

/// Completes one rope object. `theta` is used when it has no rope_theta of its own.
void complete_rope(Json& rope, const Json& theta, const Json& config) {
  const Json legacy_type = take(rope, "type");
  if (!is_set(rope, "rope_type")) rope["rope_type"] = legacy_type.is_null() ? Json("default") : legacy_type;
  if (!is_set(rope, "rope_theta")) rope["rope_theta"] = theta;
  const Json& type = rope["rope_type"];
  if ((type == "llama3" || type == "yarn" || type == "longrope") && !is_set(rope, "original_max_position_embeddings")) {
    const char* source = is_set(config, "original_max_position_embeddings") ? "original_max_position_embeddings"
                                                                            : "max_position_embeddings";
    if (is_set(config, source)) rope["original_max_position_embeddings"] = config[source];
  }
}

void check_rope(const Json& rope, const std::string& name, std::vector<std::string>& errors) {
  const Json& type = rope["rope_type"];
  const bool known =
      std::any_of(std::begin(kRopeTypes), std::end(kRopeTypes), [&](const char* t) { return type == t; });
  if (!known) {
    errors.push_back(fmt::format("{}.rope_type: got {}, expected one of {}", name, type.dump().substr(0, 60),
                                 fmt::join(kRopeTypes, ", ")));
  }
  const Json& theta = rope["rope_theta"];
  if (!theta.is_number() || !std::isfinite(theta.get<double>()) || theta.get<double>() <= 0) {
    errors.push_back(fmt::format("{}.rope_theta: got {}, expected a number above 0", name, theta.dump().substr(0, 60)));
  }
  if (type != "default" && is_set(rope, "factor")) {
    const Json& factor = rope["factor"];
    if (!factor.is_number() || !std::isfinite(factor.get<double>()) || factor.get<double>() <= 0) {
      errors.push_back(fmt::format("{}.factor: got {}, expected a number above 0", name, factor.dump().substr(0, 60)));
    }
  }
}

void normalise_rope(Json& config, const std::string& where) {
  Json theta = take(config, "rope_theta"), scaling = take(config, "rope_scaling");
  Json local_theta = take(config, "rope_local_base_freq"), rope = take(config, "rope_parameters");
  for (const auto* object : {&scaling, &rope}) {
    MOESAIC_CHECK(object->is_null() || object->is_object(), ConfigError,
                  "{}: rope_scaling / rope_parameters: got {}, expected an object", where,
                  object->dump().substr(0, 80));
  }
  std::vector<std::string> errors;
  if (config.value("model_type", Json()) == "gemma3_text") {
    if (theta.is_null()) theta = 1'000'000.0;
    if (local_theta.is_null()) local_theta = 10'000.0;
    Json nested = Json::object();
    for (const char* kind : {"full_attention", "sliding_attention"}) {
      const bool full = std::string_view(kind) == "full_attention";
      nested[kind] = is_set(rope, kind) ? rope[kind] : full && !scaling.is_null() ? scaling : Json::object();
      MOESAIC_CHECK(nested[kind].is_object(), ConfigError, "{}: rope_parameters.{}: got {}, expected an object", where,
                    kind, nested[kind].dump().substr(0, 80));
      complete_rope(nested[kind], full ? theta : local_theta, config);
      check_rope(nested[kind], std::string("rope_parameters.") + kind, errors);
    }
    rope = std::move(nested);
  } else {
    if (rope.is_null()) rope = scaling.is_null() ? Json::object() : scaling;
    complete_rope(rope, theta.is_null() ? Json(10'000.0) : theta, config);
    check_rope(rope, "rope_parameters", errors);
  }
  MOESAIC_CHECK(errors.empty(), ConfigError, "{}:\n  {}", where, fmt::join(errors, "\n  "));
  config["rope_parameters"] = std::move(rope);
}

}  // namespace

Json normalise_config(Json config, const std::string& where) {
  MOESAIC_CHECK(config.is_object(), ConfigError, "{}: is not a JSON object", where);
  if (config.contains("text_config") && config["text_config"].is_object()) config = take_text_config(config);

  Json legacy_dtype = take(config, "torch_dtype");
  if (!is_set(config, "dtype")) config["dtype"] = std::move(legacy_dtype);
  if (config["dtype"].is_null()) {
    config.erase("dtype");
  } else {
    auto dtype = get<std::string>(config, "dtype", where);
    if (dtype.starts_with("torch.")) config["dtype"] = dtype.substr(6);
  }
  if (config.value("model_type", Json()) == "gemma3_text") fill_gemma3_defaults(config, where);
  normalise_rope(config, where);
  return config;
}

Json with_legacy_rope_keys(Json config) {
  if (!is_set(config, "rope_parameters")) return config;
  Json rope = config["rope_parameters"];
  if (rope.contains("full_attention")) {
    if (rope.contains("sliding_attention")) config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"];
    rope = Json(rope["full_attention"]);
  }
  config["rope_theta"] = take(rope, "rope_theta");
  config["rope_scaling"] = rope.value("rope_type", Json()) == "default" ? Json() : rope;
  return config;
}

}  // namespace moesaic::formats
