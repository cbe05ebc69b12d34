// BitFit: a learned bias behind linears. The example of docs/adding_a_method.md.
#pragma once
#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Attached to the outputs of the linears that the targets name. Start state: biases 0.
///
///   y' = y + w scale b      w: what the row's request gives the adapter (nn::Pass::mixture), 1 without one
///
/// Source: arXiv 2106.10199. Differs: the bias stands beside the model's own, which stays frozen and may be absent.
extern const Method kBitFit;

}  // namespace moesaic::adapters
