// Folding an adapter into the base model's weights, and models as Hugging Face folders.
#pragma once
#include <filesystem>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/model_folder.h"

namespace moesaic::exporting {

/// The checkpoint as a Hugging Face folder would hold it: every tensor under its Hugging Face name, config, tokenizer,
/// chat template. Quantised tensors are dequantised. `dtype` is the folder's.
formats::ModelFolder model_folder(const formats::Checkpoint& checkpoint, at::ScalarType dtype);

/// Folds the adapter of `adapter_dir` into `model`, in float32:
///
///   LoRA      W' = W + (alpha / r) B A
///   (IA)^3    output sites: W' = diag(l) W, b' = l b;  feed-forward sites (they scale the input): W' = W diag(l)
///
/// MoLoRA and MoV with one expert are LoRA and (IA)^3. Every tensor of the adapter is used once.
/// Throws UsageError for more than one expert (the mixture depends on the token, so no single weight equals it) and for
/// scales behind a per-head norm; DataError that lists every tensor without a fitting base weight.
void merge_adapter(formats::ModelFolder& model, const std::filesystem::path& adapter_dir);

}  // namespace moesaic::exporting
