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
  auto weight = [&](const char* name) {
    const auto found = model.tensors.find(name);
    return found == model.tensors.end() ? at::Tensor() : found->second;
  };
  const at::Tensor before = weight("model.embed_tokens.weight");  // encoder-decoders have none of this name
  adapters::fold(formats::read_adapter_folder(adapter_dir), adapter_dir.string(), model.tensors);
  const at::Tensor embedding = weight("model.embed_tokens.weight"), head = weight("lm_head.weight");
  const bool own_head = embedding.defined() && head.defined() && !at::equal(head, embedding);  // the adapter's
  if (own_head) model.config["tie_word_embeddings"] = false;
  const bool embeds = embedding.defined() && !embedding.is_same(before);
  if (embeds) model.config["vocab_size"] = embedding.size(0);
  formats::adapt(model.tokenizer, adapter_dir, embeds);
}

}  // namespace moesaic::exporting
