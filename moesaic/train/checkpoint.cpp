#include "moesaic/train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <charconv>

#include "moesaic/base/file_errors.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/sha256.h"

namespace moesaic::train {
namespace {

namespace fs = std::filesystem;

constexpr const char *kState = "trainer_state.json", *kOptimizer = "optimizer.safetensors", *kDigests = "digests.json";
constexpr std::string_view kPrefix = "checkpoint-";
constexpr std::string_view kUnfinished = ".unfinished-";  // being written
constexpr std::string_view kDiscarded = ".discarded-";    // being deleted

void sync_path(const fs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY);
  MOESAIC_CHECK(descriptor >= 0, DataError, "{}: can't be opened: {}", path.string(), refusal(errno));
  const int result = ::fsync(descriptor);
  ::close(descriptor);
  MOESAIC_CHECK(result == 0, DataError, "{}: can't be written to disk: {}", path.string(), refusal(errno));
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

/// {"step": N, "sha256": {"<file>": hex}} of a folder.
Json digests_of(const fs::path& dir, int64_t step) {
  Json files = Json::object();
  for (const auto& entry : fs::recursive_directory_iterator(dir)) {
    if (entry.is_regular_file()) files[fs::relative(entry.path(), dir).generic_string()] = sha256_of_file(entry.path());
  }
  return {{"step", step}, {"sha256", std::move(files)}};
}

/// The step of a trainer's state, of which no count may be impossible.
int64_t check_state(const Json& state, const std::string& where) {
  constexpr int64_t kMost = int64_t{1} << 53;
  MOESAIC_CHECK(state.is_object(), DataError, "{}: got {}, expected keys and values", where, state.type_name());
  auto check_counts = [&](const Json& of, std::initializer_list<const char*> keys) {
    for (const char* key : keys) {
      const auto count = get_or<int64_t>(of, key, 0, where);
      MOESAIC_CHECK(count >= 0 && count < kMost, DataError, "{}: {}: got {}, which no run can count", where, key,
                    count);
    }
  };
  check_counts(state, {"global_step", "max_steps", "num_input_tokens_seen"});
  get_or<double>(state, "best_metric", 0.0, where);
  if (state.contains("moesaic")) {
    MOESAIC_CHECK(state["moesaic"].is_object(), DataError, "{}: moesaic: got {}, expected keys and values", where,
                  state["moesaic"].type_name());
    check_counts(state["moesaic"], {"examples", "evaluations_since_best"});
  }
  return get<int64_t>(state, "global_step", where);
}

/// Throws DataError unless every file of the folder is the one that was written.
void check_digests(const fs::path& dir, int64_t step) {
  const std::string where = (dir / kDigests).string();
  const Json digests = read_json(dir / kDigests);
  const bool readable = digests.is_object() && digests.contains("sha256") && digests["sha256"].is_object();
  MOESAIC_CHECK(readable, DataError, "{}: expected {{\"step\": N, \"sha256\": {{file: digest}}}}", where);
  const auto written = get<int64_t>(digests, "step", where);
  MOESAIC_CHECK(written == step, DataError, "{}: {} is of step {}, the other files are of step {}", dir.string(),
                kState, step, written);
  for (const char* name : {kState, kOptimizer}) {
    MOESAIC_CHECK(digests["sha256"].contains(name), DataError, "{}: has no digest of {}", where, name);
  }
  for (const auto& [name, digest] : digests["sha256"].items()) {
    MOESAIC_CHECK(fs::is_regular_file(dir / name), DataError, "{}: {} is missing", dir.string(), name);
    MOESAIC_CHECK(digest == sha256_of_file(dir / name), DataError,
                  "{}: {}: got other bytes than were written with this checkpoint (by their SHA-256): damaged, or of "
                  "another step",
                  dir.string(), name);
  }
}

}  // namespace

fs::path write_checkpoint(const fs::path& output_dir, int64_t step, const TrainerCheckpoint& checkpoint,
                          const std::function<void(const fs::path&)>& write_weights) {
  const std::string name = std::string(kPrefix) + std::to_string(step);
  const fs::path unfinished = output_dir / (std::string(kUnfinished) + name);
  fs::remove_all(unfinished);
  fs::create_directories(unfinished);
  write_weights(unfinished);
  formats::save_safetensors(unfinished / kOptimizer, checkpoint.tensors);
  write_file_atomically(unfinished / kState, checkpoint.state.dump(2) + "\n");
  write_file_atomically(unfinished / kDigests, digests_of(unfinished, step).dump(2) + "\n");
  for (const auto& entry : fs::recursive_directory_iterator(unfinished)) sync_path(entry.path());
  sync_path(unfinished);

  const fs::path final_path = output_dir / name;
  if (fs::exists(final_path)) discard(final_path);
  fs::rename(unfinished, final_path);
  sync_path(output_dir);
  return final_path;
}

namespace {

/// The trainer's state of a whole checkpoint; throws what read_checkpoint throws.
Json check_whole(const fs::path& dir) {
  std::vector<std::string> missing;
  for (const char* name : {kState, kOptimizer, kDigests}) {
    if (!fs::exists(dir / name)) missing.emplace_back(name);
  }
  MOESAIC_CHECK(missing.empty(), DataError,
                "{}: no whole checkpoint: got no {}\nhint: give a checkpoint-N folder of a run, or `auto`",
                dir.string(), fmt::join(missing, ", "));
  Json state = read_json(dir / kState);
  const int64_t step = check_state(state, (dir / kState).string());
  const fs::path named = dir.has_filename() ? dir : dir.parent_path();  // "out/checkpoint-5/"
  MOESAIC_CHECK(step_of(named).value_or(step) == step, DataError, "{}: global_step: got {}, expected {} as its folder",
                (dir / kState).string(), step, *step_of(named));
  check_digests(dir, step);
  return state;
}

}  // namespace

TrainerCheckpoint read_checkpoint(const fs::path& dir) {
  TrainerCheckpoint checkpoint;
  checkpoint.state = check_whole(dir);
  const formats::SafetensorsFile file(dir / kOptimizer);
  for (const std::string& name : file.names()) checkpoint.tensors[name] = file.tensor(name);
  return checkpoint;
}

std::vector<CheckpointEntry> list_checkpoints(const fs::path& output_dir) {
  std::vector<CheckpointEntry> found;
  if (!fs::is_directory(output_dir)) return found;
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    if (const auto step = step_of(entry.path()); step && entry.is_directory()) found.push_back({*step, entry.path()});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return found;
}

std::optional<CheckpointEntry> newest_checkpoint(const fs::path& output_dir, std::vector<std::string>* passed_over) {
  const std::vector<CheckpointEntry> all = list_checkpoints(output_dir);
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    try {
      check_whole(it->path);
      return *it;
    } catch (const DataError& error) {
      if (passed_over != nullptr) passed_over->emplace_back(error.what());
    }
  }
  return std::nullopt;
}

void remove_unfinished(const fs::path& output_dir) {
  if (!fs::is_directory(output_dir)) return;
  std::vector<fs::path> doomed;
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kUnfinished) || name.starts_with(kDiscarded)) doomed.push_back(entry.path());
  }
  for (const fs::path& each : doomed) fs::remove_all(each);
  remove_dead_temporaries(output_dir);
}

void rotate_checkpoints(const fs::path& output_dir, int64_t limit, int64_t step, const fs::path& keep) {
  if (limit <= 0) return;
  // Later ones are of a run that went on from an earlier step: this one will replace them when it gets there.
  auto checkpoints = list_checkpoints(output_dir);
  std::erase_if(checkpoints, [&](const CheckpointEntry& each) { return each.step > step; });
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
