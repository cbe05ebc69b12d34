// Writing GGUF, version 3. Knows no model.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

namespace moesaic::formats {

/// The bytes of a file with float32 tensors, in the order they are added.
class GgufWriter {
 public:
  void add(const std::string& key, const std::string& value);
  void add(const std::string& key, float value);
  /// `tensor`: any float dtype; converted.
  void add_tensor(const std::string& name, const at::Tensor& tensor);
  std::string bytes() const;

 private:
  std::string metadata_;
  uint64_t keys_ = 0;
  std::vector<std::pair<std::string, at::Tensor>> tensors_;
};

}  // namespace moesaic::formats
