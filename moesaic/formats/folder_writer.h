// A Hugging Face model folder written tensor by tensor.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moesaic/formats/model_folder.h"
#include "moesaic/formats/safetensors_writer.h"

namespace moesaic::formats {

/// Writes a folder whose tensors come one at a time, in any order: none but the current one is held. All files of
/// weights stand under temporary names until finish(); without one they are removed, and what stood there stays.
class FolderWriter {
 public:
  /// `about`: everything but the tensors (its own are not looked at). `tensors`: names and shapes of all that will
  /// come; floating ones are written in about.dtype, others in their own. Makes the folder when it is absent.
  FolderWriter(std::filesystem::path dir, ModelFolder about, const Declarations& tensors);
  ~FolderWriter();
  FolderWriter(const FolderWriter&) = delete;
  FolderWriter& operator=(const FolderWriter&) = delete;

  /// Throws DataError for a tensor that was not declared so, and where a number isn't finite in the folder's dtype.
  void put(const std::string& name, const at::Tensor& tensor);
  /// Every tensor has come: puts the files in place, the index and what stands beside the weights; removes weights of
  /// an older save. Throws DataError naming the tensors that have not come.
  void finish();

  /// Bytes of all tensors.
  size_t bytes() const { return bytes_; }

 private:
  void write_beside();

  std::filesystem::path dir_;
  ModelFolder about_;
  bool made_ = false;  // the folder
  size_t bytes_ = 0;
  std::vector<std::string> files_;
  std::vector<SafetensorsWriter> shards_;
  std::map<std::string, size_t> shard_of_;
};

}  // namespace moesaic::formats
