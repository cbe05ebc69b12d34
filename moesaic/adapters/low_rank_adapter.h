// LoRA and MoLoRA: one low-rank stack per targeted linear.
#pragma once
#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Attached to the linears that the targets name. Start state: A ~ Normal(0, 0.02), B = 0, routers
/// ~ Normal(0, init_std), each from a generator seeded by the site's name.
extern const Method kLora, kMoLora;

}  // namespace moesaic::adapters
