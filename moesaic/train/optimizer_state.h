// What both optimisers do with a saved state.
#pragma once
#include "moesaic/formats/safetensors.h"

namespace moesaic::train {

/// Copies `state` into the tensors of `slots`, which have the same names. Throws DataError that lists every missing,
/// unexpected and mis-shaped entry.
void restore_slots(const formats::TensorMap& state, const formats::TensorMap& slots);

}  // namespace moesaic::train
