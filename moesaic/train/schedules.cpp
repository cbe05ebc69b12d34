#include "moesaic/train/schedules.h"

#include <cmath>
#include <numbers>

#include "moesaic/base/json.h"

namespace moesaic::train {

double schedule_factor(const std::string& type, int64_t step, int64_t warmup_steps, int64_t max_steps) {
  static const std::vector<std::string> kTypes{"constant", "linear", "cosine", "inverse_sqrt"};
  if (std::find(kTypes.begin(), kTypes.end(), type) == kTypes.end()) {
    const std::string near = nearest_name(type, kTypes);
    throw UsageError(fmt::format("lr_scheduler_type: got '{}', expected one of {}{}", type, fmt::join(kTypes, ", "),
                                 near.empty() ? "" : fmt::format("; did you mean '{}'?", near)));
  }
  if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(warmup_steps);
  if (type == "constant") return 1.0;
  if (type == "inverse_sqrt") {
    const double scale = warmup_steps > 0 ? static_cast<double>(warmup_steps) : 10000.0;
    return 1.0 / std::sqrt((static_cast<double>(step - warmup_steps) + scale) / scale);
  }
  const double progress =
      static_cast<double>(step - warmup_steps) / static_cast<double>(std::max<int64_t>(1, max_steps - warmup_steps));
  if (type == "linear") return std::max(0.0, 1.0 - progress);
  return std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
}

}  // namespace moesaic::train
