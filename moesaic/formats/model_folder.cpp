#include "moesaic/formats/model_folder.h"

#include <ATen/ATen.h>

#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/folder_writer.h"

namespace moesaic::formats {

void write_model_folder(const std::filesystem::path& dir, const ModelFolder& model) {
  constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";
  TensorMap tensors = stacked(model.config.value("model_type", ""), model.tensors);
  const std::string where = dir.string();
  if (model.config.value("tie_word_embeddings", false) && tensors.contains(kHead) && tensors.contains(kEmbedding)) {
    MOESAIC_CHECK(at::equal(tensors.at(kEmbedding), tensors.at(kHead)), DataError,
                  "{}: tie_word_embeddings is true, but {} differs from {}", where, kHead, kEmbedding);
    tensors.erase(kHead);
  }
  check_unshared(tensors, where);
  FolderWriter writer(dir, model, declarations(tensors));
  for (const auto& [name, tensor] : tensors) writer.put(name, tensor);
  writer.finish();
}

}  // namespace moesaic::formats
