// adapter_config.json <-> AdapterConfig.
#include <regex>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/base/version.h"
#include "moesaic/moe/router.h"

namespace moesaic::adapters {
namespace {

TargetPattern parse_targets(const Json& json, const char* key, const std::string& where) {
  auto it = json.find(key);
  if (it == json.end() || it->is_null()) return std::vector<std::string>{};
  if (it->is_string()) return it->get<std::string>();
  return get<std::vector<std::string>>(json, key, where);
}

Json targets_json(const TargetPattern& targets) {
  return std::visit([](const auto& value) { return Json(value); }, targets);
}

void refuse(const Json& json, const char* key, bool present, const std::string& where, std::vector<std::string>& all) {
  if (present) all.push_back(fmt::format("{} = {}", key, json.at(key).dump().substr(0, 60)));
}

}  // namespace

AdapterConfig parse_adapter_config(const Json& json, const std::string& where) {
  MOESAIC_CHECK(json.is_object(), ConfigError, "{}: got {}, expected an object", where, json.type_name());
  AdapterConfig config;
  config.method = method_of_peft_type(get<std::string>(json, "peft_type", where), where).name;

  std::vector<std::string> unsupported;
  refuse(json, "use_dora", get_or(json, "use_dora", false, where), where, unsupported);
  refuse(json, "fan_in_fan_out", get_or(json, "fan_in_fan_out", false, where), where, unsupported);
  refuse(json, "bias", get_or<std::string>(json, "bias", "none", where) != "none", where, unsupported);
  for (const char* key : {"modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"}) {
    refuse(json, key, json.contains(key) && !json[key].is_null() && !json[key].empty(), where, unsupported);
  }
  MOESAIC_CHECK(unsupported.empty(), ConfigError,
                "{}: got settings that are not supported here: {}. Train the adapter "
                "without them, or merge it into its base with PEFT",
                where, fmt::join(unsupported, "; "));

  config.targets = parse_targets(json, "target_modules", where);
  config.exclude = parse_targets(json, "exclude_modules", where);
  const TargetPattern feedforward = parse_targets(json, "feedforward_modules", where);
  config.feedforward = std::holds_alternative<std::string>(feedforward)
                           ? std::vector<std::string>{std::get<std::string>(feedforward)}
                           : std::get<std::vector<std::string>>(feedforward);
  config.lora_rank = get_or<int64_t>(json, "r", 8, where);
  config.lora_alpha = get_or(json, "lora_alpha", 8.0, where);
  config.lora_dropout = get_or(json, "lora_dropout", 0.0, where);
  config.use_rslora = get_or(json, "use_rslora", false, where);
  config.rank_pattern = get_or<std::map<std::string, int64_t>>(json, "rank_pattern", {}, where);
  config.alpha_pattern = get_or<std::map<std::string, double>>(json, "alpha_pattern", {}, where);
  if (json.contains("layers_to_transform") && json["layers_to_transform"].is_number_integer()) {
    config.layers_to_transform = {json["layers_to_transform"].get<int64_t>()};
  } else {
    config.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where);
  }
  config.base_model_name_or_path = get_or<std::string>(json, "base_model_name_or_path", "", where);

  const Json block = get_or<Json>(json, "moesaic", Json::object(), where);
  const std::string in = where + ": moesaic";
  if (block.contains("num_experts")) parse_experts(block["num_experts"], in + ": num_experts", config);
  config.k_site = get_or<std::string>(block, "k_site", "output", in);
  config.base_fingerprint = get_or<std::string>(block, "base_fingerprint", "", in);
  config.base_dtype = get_or<std::string>(block, "base_dtype", "", in);
  config.router = parse_router_config(get_or<Json>(block, "router", Json::object(), in), in + ": router");
  validate(config, where);
  return config;
}

void parse_experts(const Json& json, const std::string& where, AdapterConfig& config) {
  config.layer_experts.clear();
  if (!json.is_object()) {
    config.num_experts = get<int64_t>({{"num_experts", json}}, "num_experts", where);
    return;
  }
  constexpr int64_t kMostLayers = 100000;
  const std::regex range("([0-9]{1,6})(-([0-9]{1,6}))?");
  std::vector<std::string> wrong;
  for (const auto& [key, value] : json.items()) {
    std::smatch match;
    const bool fits = std::regex_match(key, match, range);
    const int64_t first = fits ? std::stoll(match[1]) : 0;
    const int64_t last = fits && match[3].matched ? std::stoll(match[3]) : first;
    if (!fits || last < first || last >= kMostLayers || !value.is_number_integer()) {
      wrong.push_back(fmt::format("'{}': {}", key, value.dump().substr(0, 60)));
      continue;
    }
    for (int64_t layer = first; layer <= last; ++layer) {
      if (!config.layer_experts.emplace(layer, value.get<int64_t>()).second) {
        wrong.push_back(fmt::format("'{}': layer {} stands twice", key, layer));
      }
    }
  }
  MOESAIC_CHECK(wrong.empty() && !config.layer_experts.empty(), ConfigError,
                "{}: got {}; expected a number, or numbers by layers as {{\"0-7\": 4, \"8\": 10}}", where,
                wrong.empty() ? "no layer" : fmt::format("{}", fmt::join(wrong, ", ")));
  config.num_experts = 0;
  for (const auto& [layer, experts] : config.layer_experts) config.num_experts = std::max(config.num_experts, experts);
}

Json experts_json(const AdapterConfig& config) {
  if (config.layer_experts.empty()) return config.num_experts;
  Json json = Json::object();
  for (auto it = config.layer_experts.begin(); it != config.layer_experts.end();) {
    const auto [first, experts] = *it;
    int64_t last = first;
    while (++it != config.layer_experts.end() && it->first == last + 1 && it->second == experts) ++last;
    json[last == first ? std::to_string(first) : fmt::format("{}-{}", first, last)] = experts;
  }
  return json;
}

RouterConfig parse_router_config(const Json& json, const std::string& where) {
  RouterConfig router;
  router.type = get_or(json, "type", router.type, where);
  router.top_k = get_or(json, "top_k", router.top_k, where);
  router.topk_mode = get_or(json, "topk_mode", router.topk_mode, where);
  router.input = get_or(json, "input", router.input, where);
  router.sentence_dim = get_or(json, "sentence_dim", router.sentence_dim, where);
  router.sentence_source = get_or(json, "sentence_source", router.sentence_source, where);
  router.init_std = get_or(json, "init_std", router.init_std, where);
  router.jitter = get_or(json, "jitter", router.jitter, where);
  router.temperature = get_or(json, "temperature", router.temperature, where);
  router.head_wise = get_or(json, "head_wise", router.head_wise, where);
  return router;
}

Json router_config_json(const RouterConfig& router) {
  return {{"type", router.type},
          {"top_k", router.top_k},
          {"topk_mode", router.topk_mode},
          {"input", router.input},
          {"sentence_dim", router.sentence_dim},
          {"sentence_source", router.sentence_source},
          {"init_std", router.init_std},
          {"jitter", router.jitter},
          {"temperature", router.temperature},
          {"head_wise", router.head_wise}};
}

void validate(const AdapterConfig& config, const std::string& where) {
  std::vector<std::string> wrong;
  auto expect = [&](bool ok, std::string message) {
    if (!ok) wrong.push_back(std::move(message));
  };
  const RouterConfig& router = config.router;
  const Method& method = method_of(config.method);
  expect(config.num_experts >= 1 && config.num_experts <= 4096,
         fmt::format("num_experts: got {}, expected 1 to 4096", config.num_experts));
  expect(method.mixes || config.num_experts == 1,
         fmt::format("num_experts: got {} with {}, expected 1 (use molora or mov)", config.num_experts, config.method));
  expect(config.lora_rank >= 1 && config.lora_rank <= 65536,
         fmt::format("rank: got {}, expected 1 to 65536", config.lora_rank));
  expect(std::isfinite(config.lora_alpha), "lora_alpha: got a value that is not finite");
  expect(config.lora_dropout >= 0 && config.lora_dropout < 1,
         fmt::format("lora_dropout: got {}, expected 0 to below 1", config.lora_dropout));
  expect(config.k_site == "auto" || config.k_site == "output" || config.k_site == "post_qk_norm",
         fmt::format("k_site: got '{}', expected auto, output or post_qk_norm", config.k_site));
  expect(router.type == "soft" || router.type == "top_k",
         fmt::format("router.type: got '{}', expected soft or top_k", router.type));
  expect(router.type != "top_k" || (router.top_k >= 1 && router.top_k <= config.num_experts),
         fmt::format("router.top_k: got {}, expected 1 to {} (num_experts)", router.top_k, config.num_experts));
  expect(router.sentence_source == "hidden" || router.sentence_source == "column",
         fmt::format("router.sentence_source: got '{}', expected hidden or column", router.sentence_source));
  expect(router.sentence_dim >= 0 && router.sentence_dim <= (1 << 20),
         fmt::format("router.sentence_dim: got {}, expected 0 to 1048576", router.sentence_dim));
  expect(router.init_std >= 0 && std::isfinite(router.init_std),
         fmt::format("router.init_std: got {}, expected a number >= 0", router.init_std));
  expect(router.jitter >= 0 && router.jitter < 1,
         fmt::format("router.jitter: got {}, expected 0 to below 1", router.jitter));
  expect(router.temperature > 0 && std::isfinite(router.temperature),
         fmt::format("router.temperature: got {}, expected a number > 0", router.temperature));
  expect(
      router.head_wise || (method.mixes && !method.low_rank),
      fmt::format("router.head_wise: got false with {}, expected true: only mov has vectors per head", config.method));
  for (const auto& [layer, experts] : config.layer_experts) {
    expect(experts >= 1 && experts <= config.num_experts && (router.type != "top_k" || router.top_k <= experts),
           fmt::format("num_experts of layer {}: got {}, expected {} to {}", layer, experts,
                       router.type == "top_k" ? router.top_k : 1, config.num_experts));
  }
  moe::parse_topk_mode(router.topk_mode);
  moe::parse_router_input(router.input);
  if (!wrong.empty()) throw ConfigError(fmt::format("{}: {}", where, fmt::join(wrong, "; ")));
}

Json adapter_config_json(const AdapterConfig& config) {
  const Method& method = method_of(config.method);
  Json json = config.extra;
  json["peft_type"] = method.peft_type;
  json["task_type"] = get_or<std::string>(config.extra, "task_type", "CAUSAL_LM", "adapter_config.json");
  json["base_model_name_or_path"] = config.base_model_name_or_path;
  json["inference_mode"] = true;
  json["target_modules"] = targets_json(config.targets);
  json["fan_in_fan_out"] = false;
  json["modules_to_save"] = nullptr;
  const Json exclude = targets_json(config.exclude);
  if (!exclude.empty()) json["exclude_modules"] = exclude;
  if (method.low_rank) {
    json["r"] = config.lora_rank;
    json["lora_alpha"] = config.lora_alpha;
    json["lora_dropout"] = config.lora_dropout;
    json["bias"] = "none";
    json["use_rslora"] = config.use_rslora;
    json["use_dora"] = false;
    json["rank_pattern"] = config.rank_pattern;
    json["alpha_pattern"] = config.alpha_pattern;
    json["layers_to_transform"] = config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform);
  } else {
    json["feedforward_modules"] = config.feedforward;
  }
  json["moesaic"] = {{"version", kVersion},
                     {"num_experts", experts_json(config)},
                     {"router", router_config_json(config.router)},
                     {"k_site", config.k_site},
                     {"base_fingerprint", config.base_fingerprint},
                     {"base_dtype", config.base_dtype}};
  return json;
}

}  // namespace moesaic::adapters
