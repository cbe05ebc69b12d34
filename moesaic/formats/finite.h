// A number that is not finite is never written.
#pragma once
#include <optional>
#include <string>

#include "moesaic/formats/safetensors.h"

namespace moesaic::formats {

/// Throws DataError naming the first tensor with a number that is not finite, and its place, where floating tensors are
/// converted to `dtype` (none: kept as they are).
void check_finite(const TensorMap& tensors, std::optional<at::ScalarType> dtype, const std::string& where);

}  // namespace moesaic::formats
