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

/// What a run trains of a composition: its connections, and the adapters its models carry when these are trained too.
/// Folders are those of save_composition; the members must have been opened from files.
class Connections : public nn::Learner {
 public:
  /// Puts the composition into training mode. Throws UsageError for a mask that shows the future, and for adapters to
  /// be trained where no model carries one.
  Connections(std::shared_ptr<Composition> composition, bool train_adapters);
  ~Connections() override { composition_->eval(); }

  std::vector<nn::Parameter> parameters() override;
  void save(const std::filesystem::path& dir) const override { save_composition(*composition_, dir); }
  void load(const std::filesystem::path& dir) override;

 private:
  std::shared_ptr<Composition> composition_;
};

}  // namespace moesaic::compose
