#include "moesaic/generate/stop.h"

#include <algorithm>
#include <string_view>

namespace moesaic::generate {

std::string StopStrings::push(const std::string& piece) {
  if (found_) return "";
  held_ += piece;
  size_t stop_at = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = stop.empty() ? std::string::npos : held_.find(stop);
    if (at < stop_at) what_ = stop;
    stop_at = std::min(stop_at, at);
  }
  if (stop_at != std::string::npos) {
    found_ = true;
    held_.resize(stop_at);
    return std::exchange(held_, "");
  }
  size_t hold = 0;  // longest end of `held_` that begins a stop string
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size(), held_.size()); n > hold; --n) {
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) hold = n;
    }
  }
  std::string shown = held_.substr(0, held_.size() - hold);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopStrings::finish() { return std::exchange(held_, ""); }

}  // namespace moesaic::generate
