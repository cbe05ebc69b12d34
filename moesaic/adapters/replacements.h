// What acts through weights of the base as a whole: those that an adapter's file holds itself (PEFT's modules_to_save,
// biases, embeddings saved beside a LoRA), and low-rank pairs that no linear can add to its output (DoRA's, and those
// of embedding and head).
#pragma once
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/formats/claim.h"

namespace moesaic::adapters {

/// The modules that are no linears with sites of their own.
inline constexpr const char* kWholeModules[] = {"model.embed_tokens", "lm_head"};

struct Replacement {
  std::string name;  // "lm_head.weight"
  torch::Tensor weight;
  bool in_file = true;  // false: the other one of a tied pair
};

/// Takes the weights out of a file's `tensors`. `base` has the model's. With a tied head (`tied`) an embedding that
/// modules_to_save names leaves the head alone, as in PEFT, unless ensure_weight_tying is set; one that is merely saved
/// beside the adapter is both. Embedding and head may have other rows than the base's, both as many: the vocabulary was
/// resized.
/// Throws DataError listing every module of modules_to_save and every bias without a tensor and every weight of another
/// shape.
std::vector<Replacement> take_replacements(const AdapterConfig& config, formats::TensorMap& tensors, bool tied,
                                           const formats::Declarations& base);

/// Whether a tensor of an adapter's file is a weight of the model, or belongs to a pair of embedding or head.
bool acts_whole(const std::string& tensor);

/// What in an adapter acts through a weight of the model as a whole: "use_dora", and its first tensors that do.
std::vector<std::string> acting_whole(const AdapterConfig& config, const formats::TensorMap& tensors);

/// Takes the tensors of pairs that act as a whole out of a file's `tensors`.
formats::TensorMap take_whole_pairs(const AdapterConfig& config, formats::TensorMap& tensors);

/// Folds every pair, vector and magnitude of `tensors` into the weights of `model`, which are float32 then. Returns all
/// that has no place or does not fit.
formats::Misfits fold_into(formats::TensorMap& model, const AdapterConfig& config, formats::TensorMap tensors);

}  // namespace moesaic::adapters
