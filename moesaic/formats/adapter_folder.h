// A PEFT-style adapter folder: adapter_config.json + adapter_model.safetensors. Knows keys and files, not models.
#pragma once
#include <filesystem>

#include "moesaic/base/json.h"
#include "moesaic/formats/safetensors.h"

namespace moesaic::formats {

/// What stands in an adapter folder. `tensors` are keyed without PEFT's "base_model.model." prefix:
/// "model.layers.0.self_attn.q_proj.lora_A.weight". Those of a multi-modal model's other parts are left out.
struct AdapterFolder {
  OrderedJson config;    // adapter_config.json
  TensorMap tensors;     // adapter_model.safetensors
  std::string spelling;  // multi_modal_spelling() of the names in the files; `tensors` have the language model's
};

/// Whether `dir`, or its `default` sub-folder, has an adapter_config.json.
bool is_adapter(const std::filesystem::path& dir);

/// adapter_config.json of a folder (or of its `default` sub-folder). Throws DataError / FormatError.
OrderedJson read_adapter_config(const std::filesystem::path& dir);

/// Reads a folder (or its `default` sub-folder). An adapter_model.bin alone is refused with the command that converts
/// it. Throws DataError / FormatError.
AdapterFolder read_adapter_folder(const std::filesystem::path& dir);

/// The same from the two files' contents; `where` names the folder in messages.
AdapterFolder parse_adapter(std::string_view config_text, Bytes tensors, const std::string& where);

/// Writes both files atomically; creates the folder. Adds the "base_model.model." prefix.
void write_adapter_folder(const std::filesystem::path& dir, const AdapterFolder& adapter);

}  // namespace moesaic::formats
