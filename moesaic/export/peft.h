// Adapters as ordinary PEFT folders.
#pragma once
#include <filesystem>
#include <vector>

namespace moesaic::exporting {

/// Writes the adapter of `adapter_dir` for PEFT. One expert: `out` itself is a LoRA or (IA)^3 folder. More: `out`/
/// expert_0, expert_1, ... are one LoRA ((IA)^3 for MoV) each, and `out`/router.safetensors holds the routers,
/// "<site>.router.weight" [E, d_u]. PEFT can't mix them by the token; each is loaded alone.
/// Returns the adapter folders. Throws UsageError for scales behind a per-head norm, which PEFT has not.
std::vector<std::filesystem::path> export_peft(const std::filesystem::path& adapter_dir,
                                               const std::filesystem::path& out);

}  // namespace moesaic::exporting
