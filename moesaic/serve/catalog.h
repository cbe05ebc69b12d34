// What a request may name: the base, adapters, and mixtures of them.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::serve {

/// Attached adapters by the name they are attached under, with their weights; no others take part.
using Weights = std::vector<std::pair<std::string, double>>;

/// One model of the list.
struct Entry {
  std::string name;
  std::string parent;                                              // the base's name; "" of the base itself
  std::string path;                                                // of its folder or file; "" of a mixture
  Weights weights;                                                 // none: the base
  std::string hash;                                                // of its content: equal hashes answer alike
  OrderedJson facts;                                               // what else the list says of it
  int64_t created = 0;                                             // seconds since 1970
  std::shared_ptr<const tokenizer::ChatTemplate> chat_template{};  // nullptr: it has none
};

/// Names that a request may use. Safe to share between threads; what was found stays as it was.
class Catalog {
 public:
  static constexpr const char* kBase = "base";

  /// Takes the place of an entry of this name.
  void put(Entry entry);
  /// False when there is none.
  bool remove(const std::string& name);
  /// "" and "base" are the base. Throws ApiError 404 with the names there are.
  std::shared_ptr<const Entry> find(const std::string& name) const;
  bool holds(const std::string& name) const;
  std::shared_ptr<const Entry> base() const { return find(kBase); }
  /// The base first, then by name.
  std::vector<std::shared_ptr<const Entry>> all() const;

  /// `parts` as one: each with its weight. Throws ApiError 404 for unknown names. A name given twice counts twice.
  Entry mixed(const std::string& name, const std::vector<std::pair<std::string, double>>& parts) const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<std::string, std::shared_ptr<const Entry>> entries_;
  std::string base_;  // its served name
};

/// Throws UsageError unless `name` may be an adapter's or mixture's: [A-Za-z0-9._-]{1,128} and not "base".
void check_name(const std::string& name);

}  // namespace moesaic::serve
