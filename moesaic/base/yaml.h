// Run files: YAML with key=value overrides, as JSON whose keys stand in the file's order.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic {

/// The line of every value of a document by its JSON pointer ("/router/top_k"), for messages; a value of a map has its
/// key's.
using YamlLines = std::map<std::string, int64_t>;

/// Parses one YAML document. Plain scalars get their types by YAML 1.2's core schema (1e-3 is a number; yes, on and
/// 12:30 are strings); quoted ones are strings. Tags of maps and lists say nothing; those of scalars, duplicate keys,
/// non-finite numbers, and aliases that expand to more than 100,000 nodes are refused. Throws FormatError with the
/// line.
OrderedJson parse_yaml(std::string_view text, const std::string& where, YamlLines* lines = nullptr);

/// Reads a YAML file (at most 16 MiB).
OrderedJson read_yaml(const std::filesystem::path& path);

/// `json` as YAML text that parse_yaml reads back to the same value.
std::string to_yaml(const OrderedJson& json);

/// Sets each "key=value" (a dot goes into a nested map, the value is YAML: "lora_target=[q_proj, v_proj]") in `config`.
/// Throws UsageError for an override without '=' or with a value that is not YAML.
void apply_overrides(OrderedJson& config, const std::vector<std::string>& overrides);

/// Checks that every key of `config` is in `known`. A dotted name is a key of a nested map; "columns.*" accepts any
/// keys below. Throws one UsageError that lists all unknown keys, each with the nearest known one.
void check_known_keys(const Json& config, const std::vector<std::string>& known, const std::string& where);

}  // namespace moesaic
