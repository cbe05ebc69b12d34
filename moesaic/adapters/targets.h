// Which sites a target list means: PEFT's rule.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace moesaic::adapters {

/// A list of names (exact, or a dotted suffix: "q_proj" matches "model.layers.0.self_attn.q_proj") or one regex that
/// must match a whole module path.
using TargetPattern = std::variant<std::vector<std::string>, std::string>;

/// True when `path` is meant. An empty list or string matches nothing. Throws UsageError for a broken regex.
bool matches_target(const TargetPattern& pattern, const std::string& path);

/// The value of the first key of a rank_pattern / alpha_pattern that matches the end of `path` (regex), or `fallback`.
template <class T>
T pattern_value(const std::map<std::string, T>& patterns, const std::string& path, T fallback);

/// Hits per pattern over `paths`; throws UsageError naming every pattern without a hit and the nearest path.
std::vector<std::pair<std::string, int64_t>> count_matches(const TargetPattern& pattern,
                                                           const std::vector<std::string>& paths);

}  // namespace moesaic::adapters
