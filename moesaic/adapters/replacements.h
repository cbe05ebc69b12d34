// Weights of the base that an adapter's file holds whole: PEFT's modules_to_save, and embeddings saved beside a LoRA.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

struct Replacement {
  std::string name;  // "lm_head.weight"
  torch::Tensor weight;
  bool in_file = true;  // false: the other one of a tied pair
};

/// Takes the weights out of a file's `tensors`. shape_of: the base's; empty when it has none of that name. With a tied
/// head (`tied`) an embedding that modules_to_save names leaves the head alone, as in PEFT, unless ensure_weight_tying
/// is set; one that is merely saved beside the adapter is both.
/// Throws DataError listing every module of modules_to_save without a tensor and every weight of another shape.
std::vector<Replacement> take_replacements(const AdapterConfig& config, formats::TensorMap& tensors, bool tied,
                                           const std::function<std::vector<int64_t>(const std::string&)>& shape_of);

}  // namespace moesaic::adapters
