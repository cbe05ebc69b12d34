#include "moesaic/train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <charconv>

namespace moesaic::train {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "checkpoint-";
constexpr std::string_view kUnfinished = ".unfinished-";  // being written
constexpr std::string_view kDiscarded = ".discarded-";    // being deleted

void sync_path(const fs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY);
  MOESAIC_CHECK(descriptor >= 0, DataError, "{}: can't be opened: {}", path.string(), std::strerror(errno));
  const int result = ::fsync(descriptor);
  ::close(descriptor);
  MOESAIC_CHECK(result == 0, DataError, "{}: can't be written to disk: {}", path.string(), std::strerror(errno));
}

/// Deletes a folder so that a crash never leaves part of it under its name.
void discard(const fs::path& dir) {
  const fs::path doomed = dir.parent_path() / (std::string(kDiscarded) + dir.filename().string());
  fs::remove_all(doomed);
  fs::rename(dir, doomed);
  fs::remove_all(doomed);
}

std::optional<int64_t> step_of(const fs::path& dir) {
  const std::string name = dir.filename().string();
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t step = 0;
  const char* begin = name.data() + kPrefix.size();
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(begin, end, step);
  if (error != std::errc() || stop != end || step < 0) return std::nullopt;
  return step;
}

}  // namespace

fs::path write_checkpoint(const fs::path& output_dir, int64_t step, const TrainerCheckpoint& checkpoint,
                          const std::function<void(const fs::path&)>& write_weights) {
  const std::string name = std::string(kPrefix) + std::to_string(step);
  const fs::path unfinished = output_dir / (std::string(kUnfinished) + name);
  fs::remove_all(unfinished);
  fs::create_directories(unfinished);
  write_weights(unfinished);
  formats::save_safetensors(unfinished / "optimizer.safetensors", checkpoint.tensors);
  write_file_atomically(unfinished / "trainer_state.json", checkpoint.state.dump(2) + "\n");
  for (const auto& entry : fs::recursive_directory_iterator(unfinished)) sync_path(entry.path());
  sync_path(unfinished);

  const fs::path final_path = output_dir / name;
  if (fs::exists(final_path)) discard(final_path);
  fs::rename(unfinished, final_path);
  sync_path(output_dir);
  return final_path;
}

TrainerCheckpoint read_checkpoint(const fs::path& dir) {
  MOESAIC_CHECK(fs::exists(dir / "trainer_state.json") && fs::exists(dir / "optimizer.safetensors"), DataError,
                "{}: no checkpoint: got no trainer_state.json and optimizer.safetensors there\nhint: give a "
                "checkpoint-N folder of a run, or `auto`",
                dir.string());
  TrainerCheckpoint checkpoint;
  checkpoint.state = read_json(dir / "trainer_state.json");
  const formats::SafetensorsFile file(dir / "optimizer.safetensors");
  for (const std::string& name : file.names()) checkpoint.tensors[name] = file.tensor(name);
  return checkpoint;
}

std::vector<CheckpointEntry> list_checkpoints(const fs::path& output_dir) {
  std::vector<CheckpointEntry> found;
  if (!fs::is_directory(output_dir)) return found;
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kUnfinished) || name.starts_with(kDiscarded)) {
      fs::remove_all(entry.path());
    } else if (const auto step = step_of(entry.path()); step && fs::exists(entry.path() / "trainer_state.json")) {
      found.push_back({*step, entry.path()});
    }
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return found;
}

void rotate_checkpoints(const fs::path& output_dir, int64_t limit, const fs::path& keep) {
  if (limit <= 0) return;
  auto checkpoints = list_checkpoints(output_dir);
  int64_t excess = static_cast<int64_t>(checkpoints.size()) - limit;
  // The newest always stays: it is what a resumed run starts from.
  for (size_t i = 0; i + 1 < checkpoints.size() && excess > 0; ++i) {
    if (checkpoints[i].path.filename() == keep.filename()) continue;
    discard(checkpoints[i].path);
    --excess;
  }
}

void remove_checkpoints(const fs::path& output_dir) {
  for (const auto& checkpoint : list_checkpoints(output_dir)) discard(checkpoint.path);
}

}  // namespace moesaic::train
