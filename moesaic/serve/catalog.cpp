#include "moesaic/serve/catalog.h"

#include <algorithm>
#include <bit>
#include <mutex>

#include "moesaic/base/sha256.h"
#include "moesaic/serve/api_error.h"

namespace moesaic::serve {

void check_name(const std::string& name) {
  const bool letters = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-';
  });
  MOESAIC_CHECK(letters && !name.empty() && name.size() <= 128 && name != Catalog::kBase, UsageError,
                "name '{}': expected 1 to 128 letters, digits, '.', '_' or '-', and not '{}'", name, Catalog::kBase);
}

void Catalog::put(Entry entry) {
  const std::unique_lock lock(mutex_);
  if (entry.parent.empty()) base_ = entry.name;
  const std::string name = entry.name;
  entries_[name] = std::make_shared<const Entry>(std::move(entry));
}

bool Catalog::remove(const std::string& name) {
  const std::unique_lock lock(mutex_);
  return name != base_ && entries_.erase(name) > 0;
}

bool Catalog::holds(const std::string& name) const {
  const std::shared_lock lock(mutex_);
  return entries_.contains(name);
}

std::shared_ptr<const Entry> Catalog::find(const std::string& name) const {
  const std::shared_lock lock(mutex_);
  const auto found = entries_.find(name.empty() || name == kBase ? base_ : name);
  if (found != entries_.end()) return found->second;
  std::vector<std::string> known{base_};
  for (const auto& [other, entry] : entries_) {
    if (other != base_) known.push_back(other);
  }
  throw ApiError(404, fmt::format("The model `{}` does not exist. Known: {}.", name, fmt::join(known, ", ")), "model");
}

std::vector<std::shared_ptr<const Entry>> Catalog::all() const {
  const std::shared_lock lock(mutex_);
  std::vector<std::shared_ptr<const Entry>> list;
  for (const auto& [name, entry] : entries_) list.push_back(entry);
  std::stable_sort(list.begin(), list.end(),
                   [](const auto& a, const auto& b) { return a->parent.empty() > b->parent.empty(); });
  return list;
}

Entry Catalog::mixed(const std::string& name, const std::vector<std::pair<std::string, double>>& parts) const {
  const std::shared_ptr<const Entry> base = find(kBase);
  Entry entry{name, base->name, "", {}, base->hash, {{"method", "mixture"}}, base->created, base->chat_template};
  OrderedJson list = OrderedJson::array();
  for (const auto& [part, scale] : parts) {
    const std::shared_ptr<const Entry> of = find(part);
    for (const auto& [adapter, weight] : of->weights) {
      entry.weights.emplace_back(adapter, weight * scale);
      entry.hash += fmt::format(" {} {:x}", of->hash, std::bit_cast<uint64_t>(weight * scale));
    }
    // As when one adapter is named alone, the first one's template is the conversation's.
    if (&part == &parts.front().first) entry.chat_template = of->chat_template;
    list.push_back({{"name", part}, {"scale", scale}});
  }
  if (!entry.weights.empty()) entry.hash = sha256_hex(entry.hash);
  entry.facts["parts"] = std::move(list);
  return entry;
}

}  // namespace moesaic::serve
