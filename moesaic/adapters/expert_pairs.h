// PEFT's adapters of sparse models, whose experts are linears of their own here.
#pragma once
#include <set>
#include <string>

#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// Matches the linears of experts: their rows are routed already.
inline constexpr const char* kRoutedSites = R"(.*\.experts\.\d+\..*)";

/// Brings a LoRA of PEFT's on a sparse model to a pair for each matrix of each expert. `modules`: the paths of the
/// model's linears.
///
///  - `target_parameters` adapt all experts of a layer in one, W_e = W_e + s B_e A_e over transformers 5's
///    gate_up_proj [E, 2f, d] and down_proj [E, d, f]: A [E r, in] is A_e by e, B [out, r E] has B_e's columns E apart.
///    Gate and up share A_e. `experts.base_layer` holds gate_up_proj's where both are adapted, whatever their order.
///  - Target names that are those of experts, too ("gate_proj"), meant other modules where the file has no tensor of an
///    expert: transformers 5 has none for PEFT to find.
///
/// Throws DataError for shapes that are none of these.
void settle_expert_pairs(AdapterConfig& config, formats::TensorMap& tensors, const std::set<std::string>& modules);

}  // namespace moesaic::adapters
