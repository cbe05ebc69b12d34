// The standard error of a figure that is no mean, as lm-evaluation-harness estimates it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace moesaic::eval {

/// Sample deviation of `score` over `iterations` (at most 1000) resamples of `count` rows with replacement. The rows
/// are those that Python's random.Random(0).choices draws, so the number is the harness's. NaN for fewer than two rows.
double bootstrap_error(size_t count, int64_t iterations,
                       const std::function<double(const std::vector<size_t>&)>& score);

}  // namespace moesaic::eval
