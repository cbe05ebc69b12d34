#include "moesaic/adapters/targets.h"

#include <regex>

#include "moesaic/base/check.h"
#include "moesaic/base/json.h"

namespace moesaic::adapters {
namespace {

std::regex compile(const std::string& pattern) {
  try {
    return std::regex(pattern, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    throw UsageError(
        fmt::format("target pattern '{}': got a broken regex ({}), expected ECMAScript", pattern, error.what()));
  }
}

bool is_suffix(const std::string& path, const std::string& name) {
  return path == name ||
         (path.size() > name.size() && path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

std::string last_component(const std::string& path) { return path.substr(path.rfind('.') + 1); }

}  // namespace

bool matches_target(const TargetPattern& pattern, const std::string& path) {
  if (const auto* regex = std::get_if<std::string>(&pattern)) {
    return !regex->empty() && std::regex_match(path, compile(*regex));
  }
  const auto& names = std::get<std::vector<std::string>>(pattern);
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return is_suffix(path, name); });
}

template <class T>
T pattern_value(const std::map<std::string, T>& patterns, const std::string& path, T fallback) {
  for (const auto& [pattern, value] : patterns) {
    if (std::regex_match(path, compile("(.*\\.)?(" + pattern + ")"))) return value;
  }
  return fallback;
}
template int64_t pattern_value(const std::map<std::string, int64_t>&, const std::string&, int64_t);
template double pattern_value(const std::map<std::string, double>&, const std::string&, double);

std::vector<std::pair<std::string, int64_t>> count_matches(const TargetPattern& pattern,
                                                           const std::vector<std::string>& paths) {
  std::vector<std::string> names;
  if (const auto* regex = std::get_if<std::string>(&pattern)) {
    names = {*regex};
  } else {
    names = std::get<std::vector<std::string>>(pattern);
  }
  MOESAIC_CHECK(!names.empty(), UsageError, "lora_target: got no target, expected at least one");
  std::vector<std::pair<std::string, int64_t>> counts;
  std::vector<std::string> unmatched;
  for (const std::string& name : names) {
    const TargetPattern single = std::holds_alternative<std::string>(pattern)
                                     ? TargetPattern(name)
                                     : TargetPattern(std::vector<std::string>{name});
    const int64_t count = std::count_if(paths.begin(), paths.end(),
                                        [&](const std::string& path) { return matches_target(single, path); });
    counts.emplace_back(name, count);
    if (count == 0) unmatched.push_back(name);
  }
  if (!unmatched.empty()) {
    std::set<std::string> known;
    for (const std::string& path : paths) known.insert(last_component(path));
    const std::vector<std::string> candidates(known.begin(), known.end());
    const std::string nearest = nearest_name(unmatched.front(), candidates);
    std::string hits;
    for (const auto& [name, count] : counts) hits += fmt::format(" {}={}", name, count);
    throw UsageError(fmt::format("lora_target: {} without a matching site: {}. Hits:{}. Sites here: {}.{}",
                                 unmatched.size() == 1 ? "one entry" : fmt::format("{} entries", unmatched.size()),
                                 fmt::join(unmatched, ", "), hits, fmt::join(candidates, ", "),
                                 nearest.empty() ? "" : fmt::format(" Did you mean '{}'?", nearest)));
  }
  return counts;
}

}  // namespace moesaic::adapters
