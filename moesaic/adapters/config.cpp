// adapter_config.json <-> AdapterConfig.
#include <regex>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/base/version.h"
#include "moesaic/formats/config.h"
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

/// As it stands in a file that asks for nothing.
bool is_unset(const Json& value) {
  return value.is_null() || value == false || value == "" || ((value.is_array() || value.is_object()) && value.empty());
}

bool any_value(const Json&) { return true; }

/// The start values of these move the base's weights, so that A and B fit no other base; the others leave it alone.
bool keeps_base(const Json& value) {
  static const std::set<std::string> kKeeping{"gaussian", "eva", "orthogonal", "mica"};
  return value.is_null() || value.is_boolean() || (value.is_string() && kKeeping.contains(value.get<std::string>()));
}

bool is_layers(const Json& value) {
  return is_unset(value) || value == "layers" || (value.is_array() && std::count(value.begin(), value.end(), "layers"));
}

/// Keys of PEFT's LoraConfig and IA3Config that are not read, the values at which they don't change what a loaded
/// adapter computes on our linears, and the way out for the others.
struct UnreadKey {
  const char* key;
  bool (*harmless)(const Json& value);
  const char* hint;
};
constexpr UnreadKey kUnreadKeys[] = {
    {"task_type", any_value, ""},
    {"revision", any_value, ""},
    {"auto_mapping", any_value, ""},
    {"peft_version", any_value, ""},
    {"inference_mode", any_value, ""},
    {"runtime_config", any_value, ""},
    {"fan_in_fan_out", any_value, ""},  // PEFT puts it right for linears
    {"megatron_core", any_value, ""},
    {"qalora_group_size", any_value, ""},
    // Of the start values.
    {"init_ia3_weights", any_value, ""},
    {"eva_config", any_value, ""},
    {"corda_config", any_value, ""},
    {"loftq_config", any_value, ""},
    {"lora_ga_config", any_value, ""},
    {"init_lora_weights", keeps_base,
     "its start values moved the base's weights; save it with PEFT's save_pretrained(..., "
     "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"},
    {"layers_pattern", is_layers, "layers are under 'layers' here"},
};

/// Throws ConfigError naming every key that is neither read nor harmless at its value.
void check_keys(const Json& json, const std::set<std::string>& read, const std::string& where) {
  std::vector<std::string> refused;
  for (const auto& [key, value] : json.items()) {
    if (read.contains(key)) continue;
    const auto* known = std::find_if(std::begin(kUnreadKeys), std::end(kUnreadKeys),
                                     [&](const UnreadKey& unread) { return key == unread.key; });
    const bool listed = known != std::end(kUnreadKeys);
    if (listed ? known->harmless(value) : is_unset(value)) continue;
    refused.push_back(fmt::format("{} = {}{}", key, value.dump().substr(0, 60),
                                  listed ? fmt::format(" ({})", known->hint) : std::string()));
  }
  MOESAIC_CHECK(refused.empty(), ConfigError,
                "{}: got settings that are not supported here: {}\nhint: train the adapter without them, or merge it "
                "into its base with PEFT's merge_and_unload and use the merged model",
                where, fmt::join(refused, "; "));
}

template <class T>
PatternValues<T> parse_patterns(const OrderedJson& json, const char* key, const std::string& where) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return {};
  try {
    return found->get<PatternValues<T>>();
  } catch (const nlohmann::json::exception&) {
    throw ConfigError(fmt::format("{}: {}: got {}, expected {{pattern: number}}", where, key, found->dump()));
  }
}

}  // namespace

bool AdapterConfig::adapts(const std::string& path, int64_t layer) const {
  const std::string name = formats::spelled(spelling, path);
  return matches_target(targets, name) && !matches_target(exclude, name) &&
         (layers_to_transform.empty() ||
          std::find(layers_to_transform.begin(), layers_to_transform.end(), layer) != layers_to_transform.end());
}

bool AdapterConfig::scales_input(const std::string& path) const {
  const std::string name = formats::spelled(spelling, path);
  const auto* names = std::get_if<std::vector<std::string>>(&feedforward);
  if (names == nullptr) return matches_target(feedforward, name);
  return std::any_of(names->begin(), names->end(), [&](const std::string& end) { return name.ends_with(end); });
}

int64_t AdapterConfig::rank_at(const std::string& path) const {
  return rank_pattern.value(formats::spelled(spelling, path), lora_rank);
}

double AdapterConfig::scale_at(const std::string& path) const {
  const double rank = static_cast<double>(rank_at(path));
  const double alpha = alpha_pattern.value(formats::spelled(spelling, path), lora_alpha);
  return alpha / (use_rslora ? std::sqrt(rank) : rank);
}

AdapterConfig parse_adapter_config(const formats::AdapterFolder& folder, const std::string& where) {
  AdapterConfig config = parse_adapter_config(folder.config, where);
  config.spelling = folder.spelling;
  return config;
}

AdapterConfig parse_adapter_config(const OrderedJson& ordered, const std::string& where) {
  MOESAIC_CHECK(ordered.is_object(), ConfigError, "{}: got {}, expected an object", where, ordered.type_name());
  const Json json = ordered;
  AdapterConfig config;
  config.method = method_of_peft_type(get<std::string>(json, "peft_type", where), where).name;
  check_keys(json,
             {"peft_type", "target_modules", "target_parameters", "exclude_modules", "feedforward_modules", "r",
              "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern",
              "layers_to_transform", "modules_to_save", "ensure_weight_tying", "base_model_name_or_path", "moesaic"},
             where);

  config.targets = parse_targets(json, "target_modules", where);
  if (const auto* name = std::get_if<std::string>(&config.targets); name != nullptr && *name == "all-linear") {
    config.targets = ".*";
  }
  config.target_parameters = get_or<std::vector<std::string>>(json, "target_parameters", {}, where);
  config.exclude = parse_targets(json, "exclude_modules", where);
  config.feedforward = parse_targets(json, "feedforward_modules", where);
  if (!method_of(config.method).low_rank &&
      (!json.contains("feedforward_modules") || json["feedforward_modules"].is_null())) {
    config.feedforward = std::vector<std::string>{"down_proj"};  // PEFT's for every family here
  }
  config.lora_rank = get_or<int64_t>(json, "r", 8, where);
  config.lora_alpha = get_or(json, "lora_alpha", 8.0, where);
  config.lora_dropout = get_or(json, "lora_dropout", 0.0, where);
  config.use_rslora = get_or(json, "use_rslora", false, where);
  config.use_dora = get_or(json, "use_dora", false, where);
  config.bias = get_or<std::string>(json, "bias", "none", where);
  config.rank_pattern = parse_patterns<int64_t>(ordered, "rank_pattern", where);
  config.alpha_pattern = parse_patterns<double>(ordered, "alpha_pattern", where);
  if (json.contains("layers_to_transform") && json["layers_to_transform"].is_number_integer()) {
    config.layers_to_transform = {json["layers_to_transform"].get<int64_t>()};
  } else {
    config.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where);
  }
  config.modules_to_save = get_or<std::vector<std::string>>(json, "modules_to_save", {}, where);
  config.ensure_weight_tying = get_or(json, "ensure_weight_tying", false, where);
  config.base_model_name_or_path = get_or<std::string>(json, "base_model_name_or_path", "", where);
  for (const char* key : {"task_type", "revision", "auto_mapping", "peft_version"}) {
    if (json.contains(key)) config.extra[key] = json[key];
  }

  const Json block = get_or<Json>(json, "moesaic", Json::object(), where);
  const std::string in = where + ": moesaic";
  check_keys(block,
             {"version", "num_experts", "router", "k_site", "base_fingerprint", "base_dtype", "sentence_fingerprint"},
             in);
  if (block.contains("num_experts")) parse_experts(block["num_experts"], in + ": num_experts", config);
  config.k_site = get_or<std::string>(block, "k_site", "output", in);
  config.base_fingerprint = get_or<std::string>(block, "base_fingerprint", "", in);
  config.base_dtype = get_or<std::string>(block, "base_dtype", "", in);
  config.sentence_fingerprint = get_or<std::string>(block, "sentence_fingerprint", "", in);
  const Json router = get_or<Json>(block, "router", Json::object(), in);
  std::set<std::string> router_keys;
  const Json known = router_config_json(RouterConfig());
  for (const auto& [key, value] : known.items()) router_keys.insert(key);
  check_keys(router, router_keys, in + ": router");
  config.router = parse_router_config(router, in + ": router");
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

std::string AdapterConfig::sentence_encoder() const {
  const bool reads = num_experts > 1 && router.input == "sentence" && router.sentence_source != "hidden" &&
                     router.sentence_source != "column";
  return reads ? router.sentence_source : "";
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
  router.logits = get_or(json, "logits", router.logits, where);
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
          {"logits", router.logits},
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
  expect(!config.use_dora || config.method == "lora",
         fmt::format("use_dora: got true with {}, expected false: only lora has magnitudes", config.method));
  expect(config.bias == "none" || config.bias == "lora_only" || config.bias == "all",
         fmt::format("bias: got '{}', expected none, lora_only or all", config.bias));
  expect(config.lora_dropout >= 0 && config.lora_dropout < 1,
         fmt::format("lora_dropout: got {}, expected 0 to below 1", config.lora_dropout));
  expect(config.k_site == "auto" || config.k_site == "output" || config.k_site == "post_qk_norm",
         fmt::format("k_site: got '{}', expected auto, output or post_qk_norm", config.k_site));
  expect(router.type == "soft" || router.type == "top_k",
         fmt::format("router.type: got '{}', expected soft or top_k", router.type));
  expect(router.type != "top_k" || (router.top_k >= 1 && router.top_k <= config.num_experts),
         fmt::format("router.top_k: got {}, expected 1 to {} (num_experts)", router.top_k, config.num_experts));
  expect(!router.sentence_source.empty(),
         "router.sentence_source: got '', expected hidden, column or the folder of a sentence encoder");
  expect(router.sentence_dim >= 0 && router.sentence_dim <= (1 << 20),
         fmt::format("router.sentence_dim: got {}, expected 0 to 1048576", router.sentence_dim));
  expect(router.init_std >= 0 && std::isfinite(router.init_std),
         fmt::format("router.init_std: got {}, expected a number >= 0", router.init_std));
  expect(router.jitter >= 0 && router.jitter < 1,
         fmt::format("router.jitter: got {}, expected 0 to below 1", router.jitter));
  expect(router.temperature > 0 && std::isfinite(router.temperature),
         fmt::format("router.temperature: got {}, expected a number > 0", router.temperature));
  expect(router.logits == "signed" || router.logits == "absolute",
         fmt::format("router.logits: got '{}', expected signed or absolute", router.logits));
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

OrderedJson adapter_config_json(const AdapterConfig& config) {
  const Method& method = method_of(config.method);
  Json json = config.extra;
  json["peft_type"] = method.peft_type;
  json["task_type"] = get_or<std::string>(config.extra, "task_type", "CAUSAL_LM", "adapter_config.json");
  json["base_model_name_or_path"] = config.base_model_name_or_path;
  json["inference_mode"] = true;
  json["target_modules"] = targets_json(config.targets);
  json["fan_in_fan_out"] = false;
  json["modules_to_save"] = config.modules_to_save.empty() ? Json() : Json(config.modules_to_save);
  if (config.ensure_weight_tying) json["ensure_weight_tying"] = true;
  const Json exclude = targets_json(config.exclude);
  if (!exclude.empty()) json["exclude_modules"] = exclude;
  if (method.low_rank) {
    json["r"] = config.lora_rank;
    json["lora_alpha"] = config.lora_alpha;
    json["lora_dropout"] = config.lora_dropout;
    json["bias"] = config.bias;
    json["use_rslora"] = config.use_rslora;
    json["use_dora"] = config.use_dora;
  } else {
    json["feedforward_modules"] = targets_json(config.feedforward);
  }
  // PEFT's IA3Config has no such key and leaves the other layers at 1.
  if (method.low_rank || !config.layers_to_transform.empty()) {
    json["layers_to_transform"] = config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform);
  }
  json["moesaic"] = {{"version", kVersion},
                     {"num_experts", experts_json(config)},
                     {"router", router_config_json(config.router)},
                     {"k_site", config.k_site},
                     {"base_fingerprint", config.base_fingerprint},
                     {"base_dtype", config.base_dtype}};
  if (!config.sentence_fingerprint.empty()) json["moesaic"]["sentence_fingerprint"] = config.sentence_fingerprint;
  OrderedJson ordered = json;
  if (method.low_rank) {
    ordered["rank_pattern"] = config.rank_pattern;
    ordered["alpha_pattern"] = config.alpha_pattern;
  }
  return ordered;
}

}  // namespace moesaic::adapters
