// checkpoint_driver IN OUT [MAX_SHARD_BYTES]: opens a model folder or GGUF file and writes it as a model folder.
#include <iostream>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/models/registry.h"

int main(int argc, char** argv) {
  using namespace moesaic;
  if (argc < 3) return static_cast<int>(ExitCode::kUsage);
  try {
    const auto checkpoint = models::open_checkpoint(argv[1]);
    formats::ModelFolder model;
    model.config = checkpoint->config();
    for (const auto& name : checkpoint->names()) {
      at::Tensor tensor = torch::empty(checkpoint->shape(name));
      checkpoint->read_into(name, tensor);
      model.tensors[name] = tensor;
    }
    model.tokenizer = checkpoint->tokenizer_files();
    model.generation_config = checkpoint->generation_config();
    if (argc > 3) model.max_shard_bytes = std::stoull(argv[3]);
    formats::write_model_folder(argv[2], model);
  } catch (const Error& error) {
    std::cerr << error.what() << '\n';
    return static_cast<int>(error.exit_code());
  }
  return 0;
}
