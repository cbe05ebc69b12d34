// What the methods share: which sites are targets, and a site's router.
#pragma once
#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/claim.h"
#include "moesaic/moe/router.h"

namespace moesaic::adapters {

/// Throws UsageError for several experts at a site whose rows a sparse model has routed already; listing every layer
/// with a targeted linear that `layer_experts` leaves out, and every layer of it that the model has not.
void check_experts(const AdapterConfig& config, const nn::Sites& sites);

/// The router of one site: weight [E, d_u] ~ Normal(0, init_std); undefined when E = 1.
/// own_width: width of the site's own input; hidden: d, the width of layer_input and of pooled states.
moe::Router make_router(const AdapterConfig& config, const std::string& path, int64_t layer, int64_t own_width,
                        int64_t hidden, const torch::Device& device, uint64_t seed);

FileTensor router_file_tensor(const std::string& path, const torch::Tensor& weight);

}  // namespace moesaic::adapters
