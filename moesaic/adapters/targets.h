// Which sites a target list means: PEFT's rule.
#pragma once
#include <initializer_list>
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

/// A rank_pattern or alpha_pattern: regular expressions with a value each, in the order in which they are tried. In
/// JSON an object.
template <class T>
class PatternValues {
 public:
  using Item = std::pair<std::string, T>;
  PatternValues() = default;
  PatternValues(std::initializer_list<Item> items) : items_(items) {}
  const std::vector<Item>& items() const { return items_; }
  void add(std::string pattern, T value) { items_.emplace_back(std::move(pattern), value); }
  bool operator==(const PatternValues&) const = default;
  /// The value of the first pattern that matches the end of `path` from a dot on, or `fallback`.
  T value(const std::string& path, T fallback) const;

 private:
  std::vector<Item> items_;
};

template <class Object, class T>
void to_json(Object& json, const PatternValues<T>& patterns) {
  json = Object::object();
  for (const auto& [pattern, value] : patterns.items()) json[pattern] = value;
}

template <class Object, class T>
void from_json(const Object& json, PatternValues<T>& patterns) {
  patterns = {};
  for (const auto& [pattern, value] : json.template get_ref<const typename Object::object_t&>()) {
    if constexpr (std::is_integral_v<T>) {
      patterns.add(pattern, value.template get_ref<const typename Object::number_integer_t&>());
    } else {
      patterns.add(pattern, value.template get<T>());
    }
  }
}

/// Hits per pattern over `paths`; throws UsageError naming every pattern without a hit and the nearest path.
std::vector<std::pair<std::string, int64_t>> count_matches(const TargetPattern& pattern,
                                                           const std::vector<std::string>& paths);

}  // namespace moesaic::adapters
