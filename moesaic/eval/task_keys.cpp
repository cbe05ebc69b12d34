#include "moesaic/eval/task_keys.h"

#include <algorithm>

#include "moesaic/base/text.h"
#include "moesaic/eval/task_file.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMostBytes = 16 << 20;
constexpr int kMostIncludes = 8;  // one within the other

Document parse(std::string_view text, const std::string& where, const fs::path& folder) {
  Document file{where, folder, {}, {}};
  file.json = parse_yaml(text, where, &file.lines);
  MOESAIC_CHECK(file.json.is_object(), FormatError, "{}: expected a map of keys, as `task:`", where);
  return file;
}

Document open(const fs::path& path) { return parse(read_file(path, kMostBytes), path.string(), path.parent_path()); }

}  // namespace

std::string compact(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

void Entry::refuse(const std::string& key, const std::string& expected) const {
  throw FormatError(fmt::format("{}: {}: got {}, expected {}", place, key, compact(value).substr(0, 80), expected));
}

Keys::Keys(std::string place, std::map<std::string, Entry> entries)
    : place_(std::move(place)), entries_(std::move(entries)) {}

const Entry* Keys::find(const std::string& key) const {
  const auto found = entries_.find(key);
  return found == entries_.end() || found->second.value.is_null() ? nullptr : &found->second;
}

void Keys::check(const std::vector<std::string>& known) const {
  std::string unknown;
  for (const auto& [key, entry] : entries_) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    const std::string near = nearest_name(key, known);
    unknown +=
        fmt::format("\n  {}: '{}'{}", entry.place, key, near.empty() ? "" : fmt::format(" (did you mean '{}'?)", near));
  }
  MOESAIC_CHECK(unknown.empty(), FormatError, "{}: keys that are not supported:{}\nSupported are {}.", place_, unknown,
                fmt::join(known, ", "));
}

void Keys::only(const char* key, const OrderedJson& value) const {
  const Entry* entry = find(key);
  if (entry != nullptr && entry->value != value) entry->refuse(key, compact(value));
}

std::string Keys::text(const char* key, std::optional<std::string> fallback) const {
  const Entry* entry = find(key);
  if (entry == nullptr) {
    MOESAIC_CHECK(fallback.has_value(), FormatError, "{}: the key '{}' is missing", place_, key);
    return *fallback;
  }
  if (!entry->value.is_string()) entry->refuse(key, "a text");
  return entry->value.get<std::string>();
}

int64_t Keys::number(const char* key, int64_t fallback) const {
  const Entry* entry = find(key);
  if (entry == nullptr) return fallback;
  if (!entry->value.is_number_integer() || entry->value < 0) entry->refuse(key, "a whole number from 0");
  return entry->value.get<int64_t>();
}

std::vector<std::string> Keys::texts(const char* key) const {
  const Entry* entry = find(key);
  if (entry == nullptr) return {};
  if (entry->value.is_string()) return {entry->value.get<std::string>()};
  const bool all = entry->value.is_array() && std::all_of(entry->value.begin(), entry->value.end(),
                                                          [](const OrderedJson& item) { return item.is_string(); });
  if (!all) entry->refuse(key, "a text or a list of texts");
  return entry->value.get<std::vector<std::string>>();
}

Keys Keys::below(const char* key) const {
  const Entry* entry = find(key);
  std::map<std::string, Entry> entries;
  if (entry == nullptr) return {place_, entries};
  if (!entry->value.is_object()) entry->refuse(key, "a map");
  for (const auto& [inner, value] : entry->value.items()) entries[inner] = {value, entry->place};
  return {fmt::format("{}: {}", entry->place, key), entries};
}

std::string Document::place(const std::string& pointer) const {
  const auto line = lines.find(pointer);
  return line == lines.end() ? where : fmt::format("{}:{}", where, line->second);
}

Keys Document::keys(const std::string& pointer, int depth) const {
  const OrderedJson& map = json.at(OrderedJson::json_pointer(pointer));
  MOESAIC_CHECK(map.is_object(), FormatError, "{}: expected a map of keys, got {}", place(pointer),
                compact(map).substr(0, 80));
  Keys keys(place(pointer), {});
  if (map.contains("include")) {
    const Entry include{map["include"], place(pointer + "/include")};
    if (!include.value.is_string()) include.refuse("include", "a task file or the name of a built-in task");
    if (depth >= kMostIncludes) include.refuse("include", "no chain of so many files");
    const std::string name = include.value.get<std::string>();
    const fs::path beside = folder / name;
    const std::optional<Document> included =
        fs::is_regular_file(beside) ? std::optional(open(beside)) : open_task_file(name);
    if (!included)
      include.refuse("include", fmt::format("a file ({}) or the name of a built-in task", beside.string()));
    keys.fill(included->keys("", depth + 1));
  }
  for (const auto& [key, value] : map.items()) {
    if (key != "include") keys.set(key, {value, place(pointer + "/" + key)});
  }
  return keys;
}

std::optional<Document> open_task_file(const std::string& name) {
  if (is_task_file(name)) return open(name);
  for (const BuiltIn& file : kBuiltIn) {
    if (name == file.name) return parse(file.text, fmt::format("built-in {}.yaml", name), ".");
  }
  return std::nullopt;
}

}  // namespace moesaic::eval
