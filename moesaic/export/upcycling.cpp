#include "moesaic/export/upcycling.h"

#include "moesaic/base/yaml.h"

namespace moesaic::exporting {
namespace {

struct MethodKeys {
  const char* method;
  std::vector<std::string> keys;  // beside those of all
};
const std::vector<MethodKeys> kMethods{{"copy", {"num_experts", "noise", "expert_capacity"}},
                                       {"virtual_group", {"num_experts", "granularity"}},
                                       {"drop", {"num_experts", "drop"}},
                                       {"residual", {"num_experts"}},
                                       {"lora", {"num_experts", "adapters", "attention"}}};
const std::vector<std::string> kCommon{"base_model", "method", "experts_per_token", "router_init_std", "dtype", "seed"};
const std::vector<std::string> kDropKeys{"ratio", "independent"};
const std::vector<std::string> kMergeKeys{"base_model", "gate_mode",    "dtype", "experts_per_token",
                                          "experts",    "architecture", "seed",  "shared_experts"};
const std::vector<std::string> kSourceKeys{"source_model", "positive_prompts", "negative_prompts", "noise_scale",
                                           "residual_scale"};

/// Keys, and where they stand.
struct Keys {
  Json json;
  std::string where;

  int64_t count(const char* key, int64_t fallback, int64_t least, int64_t most) const {
    return bounded<int64_t>(key, fallback, static_cast<double>(least), static_cast<double>(most));
  }
  double number(const char* key, double fallback, double least, double most) const {
    return bounded<double>(key, fallback, least, most);
  }
  std::string word(const char* key, const std::string& fallback, const std::vector<std::string>& known) const {
    const auto value = get_or<std::string>(json, key, fallback, where);
    MOESAIC_CHECK(value == fallback || std::find(known.begin(), known.end(), value) != known.end(), UsageError,
                  "{}: {}: got '{}', expected one of {}", where, key, value, fmt::join(known, ", "));
    return value;
  }

 private:
  template <class T>
  T bounded(const char* key, T fallback, double least, double most) const {
    const T value = get_or<T>(json, key, fallback, where);
    MOESAIC_CHECK(static_cast<double>(value) >= least && static_cast<double>(value) <= most, UsageError,
                  "{}: {}: got {}, expected {} to {}", where, key, value, least, most);
    return value;
  }
};

/// The keys that have a value. Throws UsageError unless `json` is a map of known ones.
Keys known_keys(const Json& json, const std::vector<std::string>& known, const std::string& where) {
  MOESAIC_CHECK(json.is_object(), UsageError, "{}: got {}, expected keys and values", where, json.dump().substr(0, 80));
  check_known_keys(json, known, where);
  Keys keys{json, where};
  for (auto it = keys.json.begin(); it != keys.json.end();) it = it->is_null() ? keys.json.erase(it) : std::next(it);
  return keys;
}

std::vector<std::string> all_own_keys() {
  std::vector<std::string> all = kCommon;
  for (const MethodKeys& method : kMethods) all.insert(all.end(), method.keys.begin(), method.keys.end());
  return all;
}

/// Throws UsageError for keys that another method has.
void check_method_keys(const Keys& keys, const std::string& method) {
  for (const auto& [key, _] : keys.json.items()) {
    std::vector<std::string> owners;
    for (const MethodKeys& each : kMethods) {
      if (std::find(each.keys.begin(), each.keys.end(), key) != each.keys.end()) owners.push_back(each.method);
    }
    const bool fits = owners.empty() || std::find(owners.begin(), owners.end(), method) != owners.end();
    MOESAIC_CHECK(fits, UsageError, "{}: {} is a key of method {}, got method {}", keys.where, key,
                  fmt::join(owners, ", "), method);
  }
}

void read_common(const Keys& keys, uint64_t seed, Upcycling& result) {
  result.base_model = get<std::string>(keys.json, "base_model", keys.where);
  result.dtype = keys.word("dtype", "", {"float32", "bfloat16", "float16"});
  result.seed = get_or<uint64_t>(keys.json, "seed", seed, keys.where);
}

void read_drop(const Keys& keys, Upcycling& result) {
  const Keys drop = known_keys(keys.json.value("drop", Json::object()), kDropKeys, keys.where + ": drop");
  result.drop_ratio = drop.number("ratio", 0.5, 0, 1);
  result.drop_independent = get_or<bool>(drop.json, "independent", false, drop.where);
}

void read_adapters(const Keys& keys, Upcycling& result) {
  for (const auto& folder : get<std::vector<std::string>>(keys.json, "adapters", keys.where)) {
    result.adapters.emplace_back(folder);
  }
  result.attention = keys.word("attention", "", {"average", "drop"});
  const auto count = static_cast<int64_t>(result.adapters.size());
  MOESAIC_CHECK(keys.count("num_experts", count, 1, INT32_MAX) == count, UsageError,
                "{}: num_experts: got {}, but {} adapters", keys.where, keys.json["num_experts"].dump(), count);
  result.num_experts = count;
}

/// A virtual group is whole copies: its parts come and are chosen together.
void check_groups(const Upcycling& result, const std::string& where) {
  const int64_t parts = result.granularity;
  MOESAIC_CHECK(result.num_experts % parts == 0 && result.experts_per_token % parts == 0, UsageError,
                "{}: got num_experts {} and experts_per_token {}, expected multiples of granularity {}: a copy's parts "
                "are chosen together",
                where, result.num_experts, result.experts_per_token, parts);
}

Upcycling parse_own(const Json& json, const std::string& where, uint64_t seed) {
  constexpr int64_t kMostExperts = 4096;
  const Keys keys = known_keys(json, all_own_keys(), where);
  Upcycling result;
  std::vector<std::string> methods;
  for (const MethodKeys& each : kMethods) methods.emplace_back(each.method);
  MOESAIC_CHECK(keys.json.contains("method"), UsageError, "{}: key 'method' is missing, expected one of {}", where,
                fmt::join(methods, ", "));
  result.method = keys.word("method", "copy", methods);
  check_method_keys(keys, result.method);
  read_common(keys, seed, result);
  result.router_init_std = keys.number("router_init_std", 0.02, 0, 100);
  MOESAIC_CHECK(result.router_init_std > 0, UsageError,
                "{}: router_init_std: got 0, expected more: equal rows send every token to the same experts", where);
  if (result.method == "lora") {
    read_adapters(keys, result);
  } else {
    MOESAIC_CHECK(keys.json.contains("num_experts"), UsageError, "{}: key 'num_experts' is missing", where);
    result.num_experts = keys.count("num_experts", 0, 1, kMostExperts);
  }
  result.noise = keys.number("noise", 0, 0, 100);
  if (keys.json.contains("expert_capacity")) result.expert_capacity = keys.count("expert_capacity", 1, 1, INT32_MAX);
  if (result.method == "virtual_group") result.granularity = keys.count("granularity", 0, 2, kMostExperts);
  if (result.method == "drop") read_drop(keys, result);
  const int64_t per_token = result.method == "virtual_group" ? result.granularity : 2;
  result.experts_per_token = keys.count("experts_per_token", per_token, 1, result.num_experts);
  check_groups(result, where);
  return result;
}

SourceExpert parse_source(const Json& json, const std::string& where) {
  const Keys keys = known_keys(json, kSourceKeys, where);
  SourceExpert source;
  source.model = get<std::string>(keys.json, "source_model", where);
  source.positive = get_or<std::vector<std::string>>(keys.json, "positive_prompts", {}, where);
  source.negative = get_or<std::vector<std::string>>(keys.json, "negative_prompts", {}, where);
  source.noise_scale = keys.number("noise_scale", 0, 0, 1e6);
  source.residual_scale = keys.number("residual_scale", 1, -1e6, 1e6);
  return source;
}

std::vector<SourceExpert> parse_sources(const Keys& keys, const char* key) {
  const Json list = keys.json.value(key, Json::array());
  MOESAIC_CHECK(list.is_array(), UsageError, "{}: {}: got {}, expected a list", keys.where, key,
                list.dump().substr(0, 80));
  std::vector<SourceExpert> sources;
  for (size_t i = 0; i < list.size(); ++i) {
    sources.push_back(parse_source(list[i], fmt::format("{}: {}[{}]", keys.where, key, i)));
  }
  return sources;
}

Upcycling parse_mergekit(const Json& json, const std::string& where, uint64_t seed) {
  const Keys keys = known_keys(json, kMergeKeys, where);
  Upcycling result;
  result.method = "mergekit";
  read_common(keys, seed, result);
  result.gate_mode = keys.word("gate_mode", "hidden",
                               {"hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"});
  result.architecture = get_or<std::string>(keys.json, "architecture", "", where);
  result.experts = parse_sources(keys, "experts");
  result.shared = parse_sources(keys, "shared_experts");
  MOESAIC_CHECK(!result.experts.empty(), UsageError, "{}: experts: got none", where);
  result.num_experts = static_cast<int64_t>(result.experts.size());
  result.experts_per_token = keys.count("experts_per_token", 2, 1, result.num_experts);
  const bool drawn = result.gate_mode == "random" || result.gate_mode == "uniform_random";
  for (const auto* list : {&result.experts, &result.shared}) {
    for (const SourceExpert& source : *list) {
      MOESAIC_CHECK(drawn || !source.positive.empty(), UsageError,
                    "{}: {} has no positive_prompts, which gate_mode {} makes its gate of", where,
                    source.model.string(), result.gate_mode);
    }
  }
  return result;
}

}  // namespace

std::vector<std::filesystem::path> Upcycling::inputs() const {
  std::vector<std::filesystem::path> all{base_model};
  all.insert(all.end(), adapters.begin(), adapters.end());
  for (const auto* list : {&experts, &shared}) {
    for (const SourceExpert& source : *list) all.push_back(source.model);
  }
  return all;
}

Upcycling parse_upcycling(const Json& keys, const std::string& where, uint64_t seed) {
  MOESAIC_CHECK(keys.is_object(), UsageError, "{}: got {}, expected keys and values", where, keys.type_name());
  const bool of_mergekit = !keys.contains("method") && (keys.contains("experts") || keys.contains("gate_mode"));
  try {
    return of_mergekit ? parse_mergekit(keys, where, seed) : parse_own(keys, where, seed);
  } catch (const ConfigError& error) {
    throw UsageError(error.what());  // the keys are the user's words
  }
}

}  // namespace moesaic::exporting
