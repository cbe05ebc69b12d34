#include "moesaic/formats/config.h"

namespace moesaic::formats {
namespace {

bool is_set(const Json& json, const char* key) { return json.contains(key) && !json.at(key).is_null(); }

constexpr std::string_view kText = "model.language_model.";  // since transformers 4.52: model.language_model.layers
constexpr std::string_view kTextBefore = "language_model.";  // before: language_model.model.layers

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

/// One rope object under transformers 5's keys. `theta` is used when it has no rope_theta of its own.
Json rope_object(Json rope, const Json& theta, const Json& config) {
  const Json legacy_type = take(rope, "type");
  if (!is_set(rope, "rope_type")) rope["rope_type"] = legacy_type.is_null() ? Json("default") : legacy_type;
  if (!is_set(rope, "rope_theta")) {
    rope.erase("rope_theta");
    if (!theta.is_null()) rope["rope_theta"] = theta;
  }
  const Json& type = rope["rope_type"];
  if ((type == "llama3" || type == "yarn") && !is_set(rope, "original_max_position_embeddings")) {
    const char* source = is_set(config, "original_max_position_embeddings") ? "original_max_position_embeddings"
                                                                            : "max_position_embeddings";
    if (is_set(config, source)) rope["original_max_position_embeddings"] = config[source];
  }
  return rope;
}

void normalise_rope(Json& config, const std::string& where) {
  const Json theta = take(config, "rope_theta"), scaling = take(config, "rope_scaling");
  const Json local_theta = take(config, "rope_local_base_freq"), rope = take(config, "rope_parameters");
  auto object = [&](const Json& json, const char* name) {
    MOESAIC_CHECK(json.is_null() || json.is_object(), ConfigError, "{}: {}: got {}, expected an object", where, name,
                  json.dump().substr(0, 80));
    return json.is_null() ? Json(Json::object()) : json;
  };
  const Json given = object(rope, "rope_parameters"), scaled = object(scaling, "rope_scaling");
  const bool by_kind = given.contains("full_attention") || given.contains("sliding_attention");
  if (!by_kind && local_theta.is_null()) {
    config["rope_parameters"] = rope_object(scaled.empty() ? given : scaled, theta, config);
    return;
  }
  const Json full = object(given.value("full_attention", Json()), "rope_parameters.full_attention");
  const Json sliding = object(given.value("sliding_attention", Json()), "rope_parameters.sliding_attention");
  Json of_full = by_kind ? full : given;
  of_full.update(scaled);
  config["rope_parameters"] = {{"full_attention", rope_object(of_full, theta, config)},
                               {"sliding_attention", rope_object(sliding, local_theta, config)}};
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
  normalise_rope(config, where);
  return config;
}

std::string multi_modal_spelling(const std::string& name) {
  for (const std::string_view spelling : {kText, kTextBefore}) {
    if (name.starts_with(spelling)) return std::string(spelling);
  }
  return "";
}

std::string language_model_name(const std::string& name) {
  for (const char* prefix :
       {"vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."}) {
    if (name.starts_with(prefix)) return "";
  }
  const std::string spelling = multi_modal_spelling(name);
  return (spelling == kText ? "model." : "") + name.substr(spelling.size());
}

std::string spelled(const std::string& spelling, const std::string& name) {
  if (spelling != kText) return spelling + name;
  constexpr std::string_view kPlain = "model.";
  return name.starts_with(kPlain) ? spelling + name.substr(kPlain.size()) : name;
}

Json with_legacy_rope_keys(Json config) {
  if (!is_set(config, "rope_parameters")) return config;
  Json rope = config["rope_parameters"];
  if (rope.contains("full_attention")) {
    const Json sliding = rope.value("sliding_attention", Json::object());
    if (sliding.contains("rope_theta")) config["rope_local_base_freq"] = sliding["rope_theta"];
    rope = Json(rope["full_attention"]);
  }
  if (const Json theta = take(rope, "rope_theta"); !theta.is_null()) config["rope_theta"] = theta;
  config["rope_scaling"] = rope.value("rope_type", Json()) == "default" ? Json() : rope;
  return config;
}

}  // namespace moesaic::formats
