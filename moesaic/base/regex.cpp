#include "moesaic/base/regex.h"

#include "bridge/bridge.h"
#include "moesaic/base/check.h"

namespace moesaic {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& pattern, BridgeText reason) {
  const std::string text(reason.data, reason.size);
  bridge_text_free(reason);
  throw UsageError(fmt::format("{}: regular expression '{}': {}", where, pattern.substr(0, 200), text));
}

}  // namespace

Regex::Regex(const std::string& pattern, const std::string& where) : pattern_(pattern), where_(where) {
  BridgeText reason{nullptr, 0};
  compiled_.reset(bridge_pattern_new(pattern.data(), pattern.size(), &reason),
                  [](const BridgePattern* made) { bridge_pattern_free(const_cast<BridgePattern*>(made)); });
  if (!compiled_) refuse(where_, pattern_, reason);
}

bool Regex::matches(const std::string& text) const {
  bool matched = false;
  BridgeText reason{nullptr, 0};
  if (!bridge_pattern_matches(compiled_.get(), text.data(), text.size(), &matched, &reason)) {
    refuse(where_, pattern_, reason);
  }
  return matched;
}

}  // namespace moesaic
