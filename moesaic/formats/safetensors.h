// safetensors: memory-mapped reading and atomic writing. Knows no model.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/formats/bytes.h"

namespace moesaic::formats {

/// Tensors by name.
using TensorMap = std::map<std::string, at::Tensor>;

/// One .safetensors file, memory-mapped. Every length and offset is checked before use.
/// Source: the safetensors format description (8-byte little-endian header length, JSON header of at most 100 MB,
/// byte ranges that neither overlap nor leave holes).
class SafetensorsFile {
 public:
  /// Throws FormatError (where, got, expected) on anything that does not fit.
  explicit SafetensorsFile(const std::filesystem::path& path);
  explicit SafetensorsFile(Bytes bytes);

  const std::vector<std::string>& names() const;
  bool contains(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const;
  std::vector<int64_t> shape(const std::string& name) const;
  /// A view of the mapped file, whose mapping lives as long as the tensor (a copy where the file doesn't align the
  /// elements). Do not write to it.
  at::Tensor tensor(const std::string& name) const;
  /// The stored bytes.
  std::string_view bytes(const std::string& name) const;
  /// Bytes::release of a tensor that has been copied.
  void release(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// Writes `tensors` (widest element type first, then by name) to a temporary file, fsyncs, renames. Tensors that share
/// storage, shape and strides with an earlier name are an error unless the caller removed them first (tied weights are
/// stored once). `metadata` gets {"format": "pt"} when it has no format.
void save_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                      std::map<std::string, std::string> metadata = {});

}  // namespace moesaic::formats
