// States of frozen models, kept from one epoch to the next.
#pragma once
#include <torch/torch.h>

#include <filesystem>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace moesaic::compose {

/// Hidden states by what they were computed from, in memory or as one file each. What does not fit any more is not
/// kept: passes over the same data then find the same part of it every time, where evicting the oldest would find none.
class StateCache {
 public:
  /// Keeps at most `max_bytes`. A folder keeps its files for the next run; it is made when it does not exist. Throws
  /// DataError when it can't be.
  explicit StateCache(int64_t max_bytes, std::filesystem::path folder = {});

  /// Of everything the states depend on: the model, the blocks and the sequence.
  static std::string key(const std::string& model, const std::vector<int64_t>& blocks, const std::vector<int64_t>& ids);

  /// One tensor per block, on the CPU; nullopt when they are not kept. A file that can't be read is removed and counts
  /// as not kept.
  std::optional<std::vector<torch::Tensor>> find(const std::string& key);
  void add(const std::string& key, const std::vector<torch::Tensor>& states);

  int64_t hits() const { return hits_; }
  int64_t misses() const { return misses_; }
  int64_t bytes() const { return bytes_; }
  int64_t max_bytes() const { return max_bytes_; }

 private:
  std::filesystem::path file_of(const std::string& key) const;

  int64_t max_bytes_, bytes_ = 0, hits_ = 0, misses_ = 0;
  std::filesystem::path folder_;  // empty = in memory
  std::unordered_map<std::string, std::vector<torch::Tensor>> kept_;
  std::unordered_map<std::string, int64_t> files_;  // bytes by key
};

}  // namespace moesaic::compose
