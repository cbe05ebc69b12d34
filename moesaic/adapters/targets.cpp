#include "moesaic/adapters/targets.h"

#include <map>

#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "moesaic/base/regex.h"

namespace moesaic::adapters {
namespace {

/// A pattern is asked about every site of a model and takes longer to compile than to match.
const Regex& compiled(const std::string& pattern, const char* where) {
  constexpr size_t kMost = 64;
  thread_local std::map<std::string, Regex> known;
  if (const auto found = known.find(pattern); found != known.end()) return found->second;
  if (known.size() >= kMost) known.clear();
  return known.emplace(pattern, Regex(pattern, where)).first->second;
}

bool is_suffix(const std::string& path, const std::string& name) {
  return path == name ||
         (path.size() > name.size() && path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

std::string last_component(const std::string& path) { return path.substr(path.rfind('.') + 1); }

}  // namespace

bool matches_target(const TargetPattern& pattern, const std::string& path) {
  if (const auto* regex = std::get_if<std::string>(&pattern)) {
    return !regex->empty() && compiled(*regex, "target pattern").matches(path);
  }
  const auto& names = std::get<std::vector<std::string>>(pattern);
  return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return is_suffix(path, name); });
}

template <class T>
T PatternValues<T>::value(const std::string& path, T fallback) const {
  for (const auto& [pattern, value] : items_) {
    if (compiled("(.*\\.)?(" + pattern + ")", "pattern of ranks or alphas").matches(path)) return value;
  }
  return fallback;
}
template class PatternValues<int64_t>;
template class PatternValues<double>;

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
