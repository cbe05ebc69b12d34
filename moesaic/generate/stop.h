// Stop strings over text that arrives in pieces.
#pragma once
#include <string>
#include <vector>

namespace moesaic::generate {

/// Lets text through until one of the stop strings appears, also across the borders of pieces. Holds back only what may
/// still turn out to be the beginning of a stop string.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  /// The text that can be shown now. Nothing comes after `found`.
  std::string push(const std::string& piece);
  /// What was held back, at the end of the answer.
  std::string finish();
  bool found() const { return found_; }
  /// The stop string that was found.
  const std::string& what() const { return what_; }

 private:
  std::vector<std::string> stops_;
  std::string held_, what_;
  bool found_ = false;
};

}  // namespace moesaic::generate
