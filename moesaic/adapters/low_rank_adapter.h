// LoRA and MoLoRA: one low-rank stack per targeted linear.
#pragma once
#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Attaches `config` to the linears its targets name. Start state: A ~ Normal(0, 0.02), B = 0, routers
/// ~ Normal(0, init_std), each from a generator seeded by the site's name.
std::unique_ptr<Adapter> make_low_rank_adapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                               uint64_t seed, bool trainable, double effect);

}  // namespace moesaic::adapters
