// Folding an adapter into the base model's weights, and models as Hugging Face folders.
#pragma once
#include <filesystem>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/model_folder.h"

namespace moesaic::exporting {

/// The number format of the checkpoint's matrices; float32 where these are quantised.
at::ScalarType stored_dtype(const formats::Checkpoint& checkpoint);

/// The checkpoint as a Hugging Face folder would hold it: every tensor under its Hugging Face name, config, tokenizer,
/// chat template. Quantised tensors are dequantised. `dtype` is the folder's.
formats::ModelFolder model_folder(const formats::Checkpoint& checkpoint, at::ScalarType dtype);

/// Folds the adapter of `adapter_dir` into `model`; see adapters::fold.
void merge_adapter(formats::ModelFolder& model, const std::filesystem::path& adapter_dir);

}  // namespace moesaic::exporting
