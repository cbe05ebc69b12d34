// The weights of a model made from nothing.
#pragma once
#include <cstdint>

#include "moesaic/models/causal_lm.h"

namespace moesaic::models {

/// Normal(0, s) matrices, drawn in float32 in the order of the parameters; norms start as the identity, biases at zero.
///
///   s = 1/sqrt(fan in), for what writes to the residual stream (o_proj, down_proj) divided by sqrt(2 L);
///   embedding 0.1, an untied head 0.02, an embedding that is the head too 0.02
///
/// The same seed gives the same numbers on every device and with any number of threads.
void initialize(CausalLM& model, uint64_t seed);
/// The same of any model of such layers; L is the config's.
void initialize(torch::nn::Module& model, const DecoderConfig& config, uint64_t seed);

}  // namespace moesaic::models
