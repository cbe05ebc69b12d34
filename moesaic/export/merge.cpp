#include "moesaic/export/merge.h"

#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"

namespace moesaic::exporting {

at::ScalarType stored_dtype(const formats::Checkpoint& checkpoint) {
  for (const char* matrix :
       {"model.layers.0.self_attn.q_proj.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"}) {
    if (checkpoint.contains(matrix)) return checkpoint.dtype(matrix);
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
  const at::Tensor before = model.tensors["model.embed_tokens.weight"];
  adapters::fold(formats::read_adapter_folder(adapter_dir), adapter_dir.string(), model.tensors);
  // A head of its own, which the adapter brought.
  const auto head = model.tensors.find("lm_head.weight"), embedding = model.tensors.find("model.embed_tokens.weight");
  if (head != model.tensors.end() && !at::equal(head->second, embedding->second)) {
    model.config["tie_word_embeddings"] = false;
  }
  const bool embeds = !embedding->second.is_same(before);
  if (embeds) model.config["vocab_size"] = embedding->second.size(0);
  formats::adapt(model.tokenizer, adapter_dir, embeds);
}

}  // namespace moesaic::exporting
