// (IA)^3 and MoV: learned vectors at keys, values and the FFN branch.
#pragma once
#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Attached to the scale sites that the targets name. Start state: vectors 1, routers ~ Normal(0, init_std).
extern const Method kIa3, kMov;

}  // namespace moesaic::adapters
