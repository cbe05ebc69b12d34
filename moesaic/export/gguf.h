// Adapters as llama.cpp loads them.
#pragma once
#include <filesystem>
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::exporting {

/// The bytes of a GGUF file with the LoRA of `adapter_dir`, for a base with this config.json: what llama.cpp's `--lora`
/// takes. The pairs of all experts of a sparse layer are one stack. Throws UsageError for what llama.cpp can't do: more
/// than one expert at a site, (IA)^3, weights replaced as a whole, a family without an architecture there, a pair at
/// some experts of a layer alone.
std::string gguf_adapter(const std::filesystem::path& adapter_dir, const Json& base_config, const std::string& where);

}  // namespace moesaic::exporting
