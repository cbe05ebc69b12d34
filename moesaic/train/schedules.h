// Learning-rate schedules.
#pragma once
#include <cstdint>
#include <string>

namespace moesaic::train {

/// The factor on the learning rate of the update number `step` (0-based) of `max_steps`. All start with a linear
/// warm-up, factor step / warmup_steps. After it, with s = step - warmup_steps and T = max_steps - warmup_steps:
///
///   constant       1
///   linear         1 - s / T
///   cosine         (1 + cos(pi s / T)) / 2
///   inverse_sqrt   1 / sqrt((step + c - warmup_steps) / c),  c = warmup_steps, or 10000 without a warm-up
///
/// The values of transformers' get_*_schedule_with_warmup.
/// Throws UsageError for an unknown `type`, naming the nearest.
double schedule_factor(const std::string& type, int64_t step, int64_t warmup_steps, int64_t max_steps);

}  // namespace moesaic::train
