// A composition's folder: calm_config.json names the models with their hashes, calm_model.safetensors holds the
// connections. The models themselves stay where they are.
#pragma once
#include <filesystem>
#include <memory>

#include "moesaic/compose/composition.h"

namespace moesaic::compose {

/// True when `path` is a folder with a calm_config.json.
bool is_composition(const std::filesystem::path& path);

/// A checkpoint's model with its tokenizer.
Member open_member(const std::shared_ptr<formats::Checkpoint>& checkpoint, const models::LoadOptions& options);

/// Writes both files atomically; creates the folder. Paths of models are written relative to it. The members must have
/// been opened from files.
void save_composition(const Composition& composition, const std::filesystem::path& dir);

/// Opens the folder and every model it names. Throws ConfigError for a calm_config.json that is not one, and DataError
/// listing everything else that does not fit: models that are missing or were changed (by hash), tensors that are
/// missing, unexpected or of another shape.
std::shared_ptr<Composition> load_composition(const std::filesystem::path& dir, const models::LoadOptions& options);

/// Replaces the connections' numbers by those of a folder of the same composition.
void load_connections(Composition& composition, const std::filesystem::path& dir);

}  // namespace moesaic::compose
