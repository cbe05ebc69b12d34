// JSON: nlohmann::json with checked parsing and typed look-ups that say where a wrong value stands.
#pragma once
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moesaic/base/check.h"

namespace moesaic {

using Json = nlohmann::json;                 // keys sorted
using OrderedJson = nlohmann::ordered_json;  // keys in file order; for rows of data and chat messages

/// Parses `text`; `where` names the source in messages. Nesting deeper than 200 levels is refused.
/// Throws FormatError with line and column.
Json parse_json(std::string_view text, const std::string& where);
/// The same for rows of data, where NaN and Infinity, which Python's json and pandas write, are null.
OrderedJson parse_ordered_json(std::string_view text, const std::string& where);

/// Reads and parses a whole file. Throws FormatError; a file larger than `max_bytes` is refused.
Json read_json(const std::filesystem::path& path, size_t max_bytes = size_t{1} << 30);

/// Reads a whole file. Throws DataError when it can't be read.
std::string read_file(const std::filesystem::path& path, size_t max_bytes = size_t{1} << 30);

/// Writes to a temporary file beside `path`, fsyncs and renames: a crash never leaves half a file.
void write_file_atomically(const std::filesystem::path& path, std::string_view bytes);

/// json[key] as T; `fallback` when absent or null. Throws ConfigError with `where`, the key and what stands there.
/// Numbers are exact: an integer T refuses fractions, booleans and values out of its range.
template <class T>
T get_or(const Json& json, const char* key, T fallback, const std::string& where) {
  auto it = json.find(key);
  if (it == json.end() || it->is_null()) return fallback;
  bool fits = true;
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    if (it->is_number_float()) {
      double value = it->get<double>();
      fits = value == std::floor(value) && std::abs(value) < 9.0e15 && std::in_range<T>(static_cast<int64_t>(value));
    } else if (it->is_number_unsigned()) {
      fits = std::in_range<T>(it->get<uint64_t>());
    } else {
      fits = it->is_number_integer() && std::in_range<T>(it->get<int64_t>());
    }
  } else if constexpr (std::is_floating_point_v<T>) {
    fits = it->is_number();
  }
  if (fits) {
    try {
      return it->get<T>();
    } catch (const nlohmann::json::exception&) {
    }
  }
  std::string got = it->dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80);
  throw ConfigError(where + ": key '" + key + "' has the wrong type or range: got " + got);
}

/// json[key] as T. Throws ConfigError when absent or of the wrong type.
template <class T>
T get(const Json& json, const char* key, const std::string& where) {
  if (!json.contains(key) || json.at(key).is_null()) throw ConfigError(where + ": key '" + key + "' is missing");
  return get_or<T>(json, key, T{}, where);
}

/// The candidate that begins with `name` or that it is a typo of (one edit, or one in four letters), else the first
/// that has it inside; "" when there is none. For "did you mean" hints.
std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace moesaic
