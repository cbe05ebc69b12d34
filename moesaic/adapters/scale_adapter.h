// (IA)^3 and MoV: learned vectors at keys, values and the FFN branch.
#pragma once
#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Attaches `config` to the scale sites its targets name. Start state: vectors 1, routers ~ Normal(0, init_std).
std::unique_ptr<Adapter> make_scale_adapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                            uint64_t seed, bool trainable, double effect);

}  // namespace moesaic::adapters
