#include "moesaic/export/merge.h"

#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"

namespace moesaic::exporting {
formats::ModelFolder model_folder(const formats::Checkpoint& checkpoint, at::ScalarType dtype) {
  formats::ModelFolder folder;
  folder.config = checkpoint.config();
  folder.dtype = dtype;
  for (const std::string& name : checkpoint.names()) folder.tensors[name] = checkpoint.tensor(name);
  folder.tokenizer_json = checkpoint.tokenizer_json();
  folder.tokenizer_config = checkpoint.tokenizer_config();
  folder.chat_template = checkpoint.chat_template();
  folder.generation_config = checkpoint.generation_config();
  return folder;
}

void merge_adapter(formats::ModelFolder& model, const std::filesystem::path& adapter_dir) {
  adapters::fold(formats::read_adapter_folder(adapter_dir), adapter_dir.string(), model.tensors);
}

}  // namespace moesaic::exporting
