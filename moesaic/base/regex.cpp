#include "moesaic/base/regex.h"

#include "moesaic/base/bridge_text.h"
#include "moesaic/base/check.h"

namespace moesaic {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& pattern, const OwnedText& reason) {
  throw UsageError(fmt::format("{}: regular expression '{}': {}", where, pattern.substr(0, 200), reason.reason()));
}

}  // namespace

Regex::Regex(const std::string& pattern, const std::string& where) : pattern_(pattern), where_(where) {
  OwnedText reason;
  compiled_.reset(bridge_pattern_new(pattern.data(), pattern.size(), reason.out()),
                  [](const BridgePattern* made) { bridge_pattern_free(const_cast<BridgePattern*>(made)); });
  if (!compiled_) refuse(where_, pattern_, reason);
}

bool Regex::matches(const std::string& text) const {
  bool matched = false;
  OwnedText reason;
  if (!bridge_pattern_matches(compiled_.get(), text.data(), text.size(), &matched, reason.out())) {
    refuse(where_, pattern_, reason);
  }
  return matched;
}

}  // namespace moesaic
