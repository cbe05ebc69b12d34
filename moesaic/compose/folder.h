// A composition's folder: calm_config.json names the models with their hashes, calm_model.safetensors holds the
// connections, adapters/<place> the adapters that models carry. The models themselves stay where they are.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>

#include "moesaic/compose/composition.h"

namespace moesaic::compose {

/// True when `path` is a folder with a calm_config.json.
bool is_composition(const std::filesystem::path& path);

/// What a member is beside its checkpoint.
struct MemberOptions {
  std::optional<uint64_t> random_seed{};  // models::initialize with this seed instead of the checkpoint's weights
  std::filesystem::path adapter{};        // folder of an adapter to carry; empty = none
  int64_t num_blocks = -1;                // as models::LoadOptions; the whole where it has an adapter or a seed
};

/// A checkpoint's model with its tokenizer and adapter. Throws DataError for an adapter that routes by sentence: the
/// models of a composition are not asked what a sentence is about.
Member open_member(const std::shared_ptr<formats::Checkpoint>& checkpoint, const models::LoadOptions& load,
                   const MemberOptions& options = {});

/// Writes every file atomically, calm_config.json last; creates the folder. Paths of models are written relative to it.
/// The members must have been opened from files.
void save_composition(const Composition& composition, const std::filesystem::path& dir);

/// Opens the folder and every model it names. Throws ConfigError for a calm_config.json that is not one, and DataError
/// listing everything else that does not fit: models that are missing or were changed (by hash), tensors that are
/// missing, unexpected or of another shape.
std::shared_ptr<Composition> load_composition(const std::filesystem::path& dir, const models::LoadOptions& options);

/// Replaces the numbers of the connections and, where they are trained, of the adapters by those of a folder of the
/// same composition.
void load_trained(Composition& composition, const std::filesystem::path& dir);

}  // namespace moesaic::compose
