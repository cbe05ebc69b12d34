// safetensors files written tensor by tensor.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "moesaic/formats/claim.h"

namespace moesaic::formats {

/// Writes a file whose tensors come one at a time, in any order, so that none but the current one is held. The file
/// stands under a temporary name until commit(); without one nothing is left.
class SafetensorsWriter {
 public:
  /// Every tensor is declared with its dtype. The widest element type lies first, then by name. `metadata` gets
  /// {"format": "pt"} when it has no format.
  SafetensorsWriter(const std::filesystem::path& path, const Declarations& tensors,
                    std::map<std::string, std::string> metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(SafetensorsWriter&&) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) noexcept;

  /// Writes the numbers of a declared tensor. Throws DataError when it was not declared, is here already, has another
  /// shape or dtype, or holds a number that is not finite.
  void put(const std::string& name, const at::Tensor& tensor);
  /// Throws DataError naming the tensors that have not come.
  void check_whole() const;
  /// check_whole(), then fsyncs and renames.
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Throws DataError for an undefined tensor, and for two names of the same numbers.
void check_unshared(const TensorMap& tensors, const std::string& where);

}  // namespace moesaic::formats
