#include "moesaic/compose/state_cache.h"

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/base/sha256.h"
#include "moesaic/formats/safetensors.h"

namespace moesaic::compose {
namespace {

namespace fs = std::filesystem;

int64_t bytes_of(const std::vector<torch::Tensor>& states) {
  int64_t bytes = 0;
  for (const torch::Tensor& state : states) bytes += static_cast<int64_t>(state.nbytes());
  return bytes;
}

}  // namespace

StateCache::StateCache(int64_t max_bytes, fs::path folder) : max_bytes_(max_bytes), folder_(std::move(folder)) {
  if (folder_.empty()) return;
  std::error_code error;
  fs::create_directories(folder_, error);
  MOESAIC_CHECK(!error && fs::is_directory(folder_), DataError, "{}: the folder for frozen states can't be made: {}",
                folder_.string(), error ? refusal(error.value()) : "a file is in its place");
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() != ".safetensors") continue;
    const auto size = static_cast<int64_t>(entry.file_size());
    files_[entry.path().stem().string()] = size;
    bytes_ += size;
  }
}

std::string StateCache::key(const std::string& model, const std::vector<int64_t>& blocks,
                            const std::vector<int64_t>& ids) {
  Sha256 hash;
  auto add = [&](const std::vector<int64_t>& numbers) {
    const auto count = static_cast<int64_t>(numbers.size());
    hash.update(&count, sizeof(count));
    hash.update(numbers.data(), numbers.size() * sizeof(int64_t));
  };
  hash.update(model);
  add(blocks);
  add(ids);
  return hash.hex();
}

fs::path StateCache::file_of(const std::string& key) const { return folder_ / (key + ".safetensors"); }

std::optional<std::vector<torch::Tensor>> StateCache::find(const std::string& key) {
  if (auto kept = kept_.find(key); kept != kept_.end()) {
    ++hits_;
    return kept->second;
  }
  if (auto file = files_.find(key); file != files_.end()) {
    try {
      const formats::SafetensorsFile states(file_of(key));
      std::vector<torch::Tensor> found;
      for (size_t i = 0; i < states.names().size(); ++i) found.push_back(states.tensor(std::to_string(i)).clone());
      ++hits_;
      return found;
    } catch (const Error& error) {
      spdlog::warn("frozen states are computed again: {}", error.what());
      std::error_code ignored;
      fs::remove(file_of(key), ignored);
      bytes_ -= file->second;
      files_.erase(file);
    }
  }
  ++misses_;
  return std::nullopt;
}

void StateCache::add(const std::string& key, const std::vector<torch::Tensor>& states) {
  const int64_t size = bytes_of(states);
  if (bytes_ + size > max_bytes_ || kept_.contains(key) || files_.contains(key)) return;
  std::vector<torch::Tensor> copies;
  for (const torch::Tensor& state : states) copies.push_back(state.detach().to(torch::kCPU).clone());
  if (folder_.empty()) {
    kept_[key] = std::move(copies);
    bytes_ += size;
    return;
  }
  formats::TensorMap tensors;
  for (size_t i = 0; i < copies.size(); ++i) tensors[std::to_string(i)] = copies[i];
  formats::save_safetensors(file_of(key), tensors);
  const auto written = static_cast<int64_t>(fs::file_size(file_of(key)));
  files_[key] = written;
  bytes_ += written;
}

}  // namespace moesaic::compose
