// Training checkpoints as folders that are complete or absent, and known by the digests of their files.
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
  formats::TensorMap tensors;  // optimizer.safetensors: the optimizer's state
};

/// A checkpoint's folder, by its name.
struct CheckpointEntry {
  int64_t step;
  std::filesystem::path path;
};

/// Writes `output_dir`/checkpoint-<step>: `write_weights(folder)`'s files, optimizer.safetensors, trainer_state.json,
/// and digests.json with the step and the SHA-256 of every other file.
/// Everything is written to a temporary folder, fsynced and renamed: a crash at any moment leaves the earlier
/// checkpoints and no half one. A checkpoint of the same step is replaced. Returns its path.
std::filesystem::path write_checkpoint(const std::filesystem::path& output_dir, int64_t step,
                                       const TrainerCheckpoint& checkpoint,
                                       const std::function<void(const std::filesystem::path&)>& write_weights);

/// Throws DataError when it is not a checkpoint: naming the file that is missing or not the one that was written, or
/// the value of trainer_state.json that can't be.
TrainerCheckpoint read_checkpoint(const std::filesystem::path& dir);

/// The checkpoints of a run, oldest first, whole or not.
std::vector<CheckpointEntry> list_checkpoints(const std::filesystem::path& output_dir);

/// The newest that read_checkpoint would take. passed_over, when given, gets what is wrong with every newer one.
std::optional<CheckpointEntry> newest_checkpoint(const std::filesystem::path& output_dir,
                                                 std::vector<std::string>* passed_over = nullptr);

/// Removes what a crash left half written or half deleted. The folder must be this process's own.
void remove_unfinished(const std::filesystem::path& output_dir);

/// Deletes the oldest of the checkpoints up to `step`, the newest, until `limit` are left (0 = keep all); `keep`, the
/// best one, is never deleted.
void rotate_checkpoints(const std::filesystem::path& output_dir, int64_t limit, int64_t step,
                        const std::filesystem::path& keep);

/// Deletes every checkpoint.
void remove_checkpoints(const std::filesystem::path& output_dir);

}  // namespace moesaic::train
