// The fields of a request's body, each read once and checked.
#pragma once
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "moesaic/serve/api_error.h"

namespace moesaic::serve {

/// Reads the fields of a JSON object; null is absent. Each method throws ApiError 400 with the field, what it got and
/// what it expected.
class Fields {
 public:
  /// path: of the object in the body, "" the body itself; `json` outlives this.
  explicit Fields(const OrderedJson& json, std::string path = "");

  const OrderedJson& json() const { return json_; }
  bool has(const std::string& name);
  /// nullptr when absent.
  const OrderedJson* find(const std::string& name);
  bool flag(const std::string& name, bool fallback);
  int64_t integer(const std::string& name, int64_t fallback, int64_t least,
                  int64_t most = std::numeric_limits<int64_t>::max());
  double number(const std::string& name, double fallback, double least, double most);
  std::string text(const std::string& name, const std::string& fallback, size_t most_bytes = size_t{1} << 20);
  /// A text or a list of texts.
  std::vector<std::string> texts(const std::string& name, size_t most, size_t most_bytes);

  /// The objects of a list, by their places; none when absent.
  std::vector<Fields> objects(const std::string& name, const std::string& expected);
  /// A text, or the texts of a list of parts of these types, joined; "" when absent. unread: what else parts hold.
  std::string joined_text(const std::string& name, const std::vector<std::string>& types, const std::string& expected,
                          const std::string& unread);

  /// `json`, a part of the field, as token ids.
  std::vector<int64_t> token_ids(const std::string& name, const OrderedJson& json, int64_t vocab_size);

  /// A field that this server takes with one of these values alone.
  void only(const std::string& name, const std::vector<OrderedJson>& values, const std::string& why);
  /// A field that changes nothing here.
  void ignore(const std::string& name) { read_.insert(name); }

  /// The fields that were not read. Throws for one that is a letter away from one that was.
  std::vector<std::string> unknown() const;

  /// "messages[0].content"
  std::string path_of(const std::string& name) const { return path_.empty() ? name : path_ + "." + name; }
  [[noreturn]] void refuse(const std::string& name, const std::string& expected);

 private:
  const OrderedJson& json_;
  std::string path_;
  std::set<std::string> read_;
};

}  // namespace moesaic::serve
