#include "moesaic/formats/folder_writer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "moesaic/base/file_errors.h"
#include "moesaic/formats/config.h"
#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/finite.h"

namespace moesaic::formats {
namespace {

namespace fs = std::filesystem;
constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

std::string dtype_word(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "float32";
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    case at::kDouble: return "float64";
    default: throw DataError(fmt::format("a model can't be saved as {}", c10::toString(dtype)));
  }
}

/// What each shard holds, filled in name order up to the limit.
std::vector<Declarations> plan_shards(const Declarations& tensors, at::ScalarType dtype, size_t max_bytes,
                                      size_t& total) {
  std::vector<Declarations> shards(1);
  size_t used = 0;
  total = 0;
  for (const auto& [name, tensor] : tensors) {
    const at::ScalarType own = tensor.dtype.value_or(dtype);
    const at::ScalarType written = at::isFloatingType(own) ? dtype : own;
    const size_t bytes = c10::multiply_integers(tensor.shape) * c10::elementSize(written);
    if (used > 0 && used + bytes > max_bytes) {
      shards.emplace_back();
      used = 0;
    }
    shards.back()[name] = {tensor.shape, written};
    used += bytes;
    total += bytes;
  }
  return shards;
}

bool is_weight_file(const std::string& name) {
  return name == kSingleName || name == kIndexName || (name.starts_with("model-") && name.ends_with(".safetensors"));
}

}  // namespace

FolderWriter::FolderWriter(fs::path dir, ModelFolder about, const Declarations& tensors)
    : dir_(std::move(dir)), about_(std::move(about)) {
  const auto plan = plan_shards(tensors, about_.dtype, about_.max_shard_bytes, bytes_);
  std::error_code error;
  made_ = fs::create_directories(dir_, error);
  MOESAIC_CHECK(!error, DataError, "{}: the folder can't be made: {}", dir_.string(), refusal(error.value()));
  for (size_t i = 0; i < plan.size(); ++i) {
    files_.push_back(plan.size() == 1 ? kSingleName
                                      : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, plan.size()));
    shards_.emplace_back(dir_ / files_[i], plan[i]);
    for (const auto& [name, _] : plan[i]) shard_of_[name] = i;
  }
}

FolderWriter::~FolderWriter() {
  shards_.clear();
  std::error_code filled;
  if (made_) fs::remove(dir_, filled);
}

void FolderWriter::put(const std::string& name, const at::Tensor& tensor) {
  const auto shard = shard_of_.find(name);
  MOESAIC_CHECK(shard != shard_of_.end(), DataError, "{}: tensor '{}' was not declared", dir_.string(), name);
  const bool converts = tensor.is_floating_point() && tensor.scalar_type() != about_.dtype;
  if (converts) check_finite({{name, tensor}}, about_.dtype, dir_.string());  // before it becomes infinite
  shards_[shard->second].put(name, converts ? tensor.detach().to(about_.dtype) : tensor);
}

void FolderWriter::finish() {
  for (const SafetensorsWriter& shard : shards_) shard.check_whole();
  for (SafetensorsWriter& shard : shards_) shard.commit();
  std::set<std::string> written(files_.begin(), files_.end());
  if (files_.size() > 1) {
    Json weight_map = Json::object();
    for (const auto& [name, shard] : shard_of_) weight_map[name] = files_[shard];
    const Json index = {{"metadata", {{"total_size", bytes_}}}, {"weight_map", weight_map}};
    write_file_atomically(dir_ / kIndexName, index.dump(2) + "\n");
    written.insert(kIndexName);
  }
  for (const auto& entry : fs::directory_iterator(dir_)) {
    const std::string name = entry.path().filename().string();
    if (is_weight_file(name) && !written.contains(name)) fs::remove(entry.path());
  }
  write_beside();
}

void FolderWriter::write_beside() {
  if (about_.config.contains(kRopeMagnitude)) {
    spdlog::warn("{}: config.json says {} = {}, which other programs don't read: transformers has it for yarn alone",
                 dir_.string(), kRopeMagnitude, about_.config[kRopeMagnitude].dump());
  }
  Json config = with_legacy_rope_keys(with_both_expert_counts(about_.config));
  config["dtype"] = dtype_word(about_.dtype);
  write_file_atomically(dir_ / "config.json", config.dump(2) + "\n");
  write_tokenizer_files(dir_, about_.tokenizer);
  if (!about_.generation_config.empty()) {
    write_file_atomically(dir_ / "generation_config.json", about_.generation_config.dump(2) + "\n");
  }
}

}  // namespace moesaic::formats
