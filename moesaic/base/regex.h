// Regular expressions that stand in files.
#pragma once
#include <memory>
#include <string>

struct BridgePattern;

namespace moesaic {

/// A regular expression in Python's syntax, with look-around and named groups. It may come from anybody: size and steps
/// are bounded.
class Regex {
 public:
  /// `where` names it in messages. Throws UsageError when it is broken.
  Regex(const std::string& pattern, const std::string& where);

  /// Whether the whole of `text` matches, as Python's re.fullmatch. Throws UsageError when that takes too many steps.
  bool matches(const std::string& text) const;

 private:
  std::string pattern_, where_;
  std::shared_ptr<const BridgePattern> compiled_;
};

}  // namespace moesaic
