// Training checkpoints as folders that are complete or absent.
#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/formats/safetensors.h"

namespace moesaic::train {

/// What a run needs beside its weights to go on exactly.
struct TrainerCheckpoint {
  Json state;                  // trainer_state.json
  formats::TensorMap tensors;  // optimizer.safetensors: the optimizer's state and the random generators'
};

/// A complete checkpoint folder of a run.
struct CheckpointEntry {
  int64_t step;
  std::filesystem::path path;
};

/// Writes `output_dir`/checkpoint-<step>: `write_weights(folder)`'s files, optimizer.safetensors, trainer_state.json.
/// Everything is written to a temporary folder, fsynced and renamed: a crash at any moment leaves the earlier
/// checkpoints and no half one. A checkpoint of the same step is replaced. Returns its path.
std::filesystem::path write_checkpoint(const std::filesystem::path& output_dir, int64_t step,
                                       const TrainerCheckpoint& checkpoint,
                                       const std::function<void(const std::filesystem::path&)>& write_weights);

/// Throws FormatError / DataError when it is not a checkpoint.
TrainerCheckpoint read_checkpoint(const std::filesystem::path& dir);

/// The complete checkpoints of a run, oldest first. Removes what a crash left half written or half deleted.
std::vector<CheckpointEntry> list_checkpoints(const std::filesystem::path& output_dir);

/// Deletes the oldest checkpoints until `limit` are left (0 = keep all); `keep`, the best one, is never deleted.
void rotate_checkpoints(const std::filesystem::path& output_dir, int64_t limit, const std::filesystem::path& keep);

/// Deletes every checkpoint.
void remove_checkpoints(const std::filesystem::path& output_dir);

}  // namespace moesaic::train
