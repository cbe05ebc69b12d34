// Writing a Hugging Face model folder that transformers loads.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <optional>
#include <string>

#include "moesaic/base/json.h"
#include "moesaic/formats/safetensors.h"
#include "moesaic/formats/tokenizer_files.h"

namespace moesaic::formats {

/// What goes into a model folder.
struct ModelFolder {
  Json config;                        // config.json; `dtype` is set from `dtype` below
  TensorMap tensors;                  // Hugging Face names
  at::ScalarType dtype = at::kFloat;  // floating tensors are converted to it on writing
  TokenizerFiles tokenizer;
  Json generation_config = Json::object();  // left out when empty
  size_t max_shard_bytes = size_t{5} << 30;
};

/// Writes the folder (created when absent): config.json, model.safetensors or shards with their index, tokenizer
/// files, chat templates. With `tie_word_embeddings` the head is left out; DataError when it differs from the
/// embedding. Each file is replaced atomically; weights of an older save in the folder are removed.
void write_model_folder(const std::filesystem::path& dir, const ModelFolder& model);

}  // namespace moesaic::formats
