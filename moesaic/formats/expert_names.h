// Sparse models' experts as they lie in files: one matrix per expert, or all of a layer's in one tensor.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/formats/safetensors.h"

namespace moesaic::formats {

/// What a family calls the parts of a sparse layer, in the files that transformers writes with one matrix per expert:
/// "<layer>.<block>.gate.weight" [E, d], "<layer>.<block>.experts.<e>.<gate_proj>.weight" [f, d], and so on;
/// "<layer>.<block>.shared_expert.<gate_proj>.weight" and "<layer>.<block>.shared_expert_gate.weight" [1, d] of an
/// expert that every token has.
struct ExpertNames {
  const char *block = "mlp", *gate_proj = "gate_proj", *up_proj = "up_proj", *down_proj = "down_proj";
};
/// nullopt for a family without experts.
std::optional<ExpertNames> expert_names(const std::string& model_type);

/// Where a tensor lies: rows of a stored one, whose leading axes are taken as one.
struct StoredRows {
  std::string stored;
  int64_t begin = 0, count = -1;  // -1: the whole tensor, in its own shape
};

/// Every tensor of a file by the name with one matrix per expert. Stacks are taken apart: gate and up [E, 2f, d] with
/// down [E, d, f] as transformers 5 and mergekit hold them (`experts.gate_up_proj`), or granite's (`input_linear`); so
/// is granite's `shared_mlp`. `shapes`: of the stored tensors. Throws FormatError when two mean the same.
std::map<std::string, StoredRows> unstacked(const ExpertNames& names,
                                            const std::map<std::string, std::vector<int64_t>>& shapes,
                                            const std::string& where);

/// config.json with the number of experts under both of its keys: transformers 5 writes some families' as
/// num_local_experts, where transformers 4 reads num_experts.
Json with_both_expert_counts(Json config);

/// The other way, for families whose files hold stacks (granitemoe); all others' tensors stay as they are.
TensorMap stacked(const std::string& model_type, TensorMap tensors);

}  // namespace moesaic::formats
