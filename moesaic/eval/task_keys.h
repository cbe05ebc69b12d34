// The keys of task files: every value with the line where it stands, laid over those of the file that it includes.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/base/yaml.h"

namespace moesaic::eval {

/// The value of a key, and where it stands.
struct Entry {
  OrderedJson value;
  std::string place;  // file:line

  /// Throws FormatError.
  [[noreturn]] void refuse(const std::string& key, const std::string& expected) const;
};

/// The keys of a map in a task file. A key without a value counts as absent. Throws FormatError for values of another
/// kind than asked for.
class Keys {
 public:
  Keys(std::string place, std::map<std::string, Entry> entries);

  const std::string& place() const { return place_; }
  /// nullptr when it is absent.
  const Entry* find(const std::string& key) const;
  /// Throws one FormatError for all keys that are none of `known`.
  void check(const std::vector<std::string>& known) const;
  /// Throws unless the key is absent or has this value.
  void only(const char* key, const OrderedJson& value) const;

  /// Throws when the key is absent and there is no fallback.
  std::string text(const char* key, std::optional<std::string> fallback = std::nullopt) const;
  /// A whole number from 0.
  int64_t number(const char* key, int64_t fallback) const;
  /// A text or a list of texts; none when the key is absent.
  std::vector<std::string> texts(const char* key) const;
  /// The keys of the map at this one; none when it is absent.
  Keys below(const char* key) const;

  void set(const std::string& key, Entry entry) { entries_[key] = std::move(entry); }
  void erase(const std::string& key) { entries_.erase(key); }
  /// Takes what is not here from `defaults`.
  void fill(const Keys& defaults) { entries_.insert(defaults.entries_.begin(), defaults.entries_.end()); }

 private:
  std::string place_;
  std::map<std::string, Entry> entries_;
};

/// A parsed task file.
struct Document {
  std::string where;
  std::filesystem::path folder;  // of files that it includes
  OrderedJson json;              // a map
  YamlLines lines;

  std::string place(const std::string& pointer) const;
  /// The map at `pointer`, over what it includes: a file beside this one, or a built-in one.
  Keys keys(const std::string& pointer = "", int depth = 0) const;
};

/// nullopt when `name` is neither a path to a .yaml file nor a built-in file's name.
std::optional<Document> open_task_file(const std::string& name);

/// Compact JSON, whatever bytes are in it.
std::string compact(const OrderedJson& json);

}  // namespace moesaic::eval
