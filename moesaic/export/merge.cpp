#include "moesaic/export/merge.h"

#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"

namespace moesaic::exporting {

namespace {

/// T5Gemma 2's modules have a part `text_model` in their names that its files leave out.
formats::TensorMap by_file_names(formats::TensorMap tensors) {
  constexpr std::string_view kModule = "encoder.text_model.", kFile = "encoder.";
  formats::TensorMap renamed;
  for (auto& [name, tensor] : tensors) {
    std::string key = name;
    if (const size_t at = key.find(kModule); at != std::string::npos) key.replace(at, kModule.size(), kFile);
    renamed[key] = tensor;
  }
  return renamed;
}

}  // namespace

at::ScalarType stored_dtype(const formats::Checkpoint& checkpoint) {
  for (const std::string& name : checkpoint.names()) {
    if (name.ends_with(".q_proj.weight") || name.ends_with(".q.weight")) return checkpoint.dtype(name);
  }
  return at::kFloat;
}

formats::ModelFolder model_folder(const formats::Checkpoint& checkpoint, at::ScalarType dtype) {
  formats::ModelFolder folder;
  folder.config = checkpoint.config();
  folder.dtype = dtype;
  for (const std::string& name : checkpoint.names()) folder.tensors[name] = checkpoint.tensor(name);
  folder.tokenizer = checkpoint.tokenizer_files();
  folder.generation_config = checkpoint.generation_config();
  return folder;
}

void merge_adapter(formats::ModelFolder& model, const std::filesystem::path& adapter_dir) {
  auto weight = [&](const char* name) {
    const auto found = model.tensors.find(name);
    return found == model.tensors.end() ? at::Tensor() : found->second;
  };
  const at::Tensor before = weight("model.embed_tokens.weight");  // encoder-decoders have none of this name
  formats::AdapterFolder adapter = formats::read_adapter_folder(adapter_dir);
  if (model.config.value("model_type", "") == "t5gemma2") adapter.tensors = by_file_names(std::move(adapter.tensors));
  adapters::fold(adapter, adapter_dir.string(), model.tensors);
  const at::Tensor embedding = weight("model.embed_tokens.weight"), head = weight("lm_head.weight");
  const bool own_head = embedding.defined() && head.defined() && !at::equal(head, embedding);  // the adapter's
  if (own_head) model.config["tie_word_embeddings"] = false;
  const bool embeds = embedding.defined() && !embedding.is_same(before);
  if (embeds) model.config["vocab_size"] = embedding.size(0);
  formats::adapt(model.tokenizer, adapter_dir, embeds);
}

}  // namespace moesaic::exporting
