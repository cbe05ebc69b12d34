// A GGUF file seen as a Hugging Face checkpoint: config, tensor names and layouts, tokenizer.
#pragma once
#include <functional>

#include "moesaic/formats/bytes.h"
#include "moesaic/formats/checkpoint.h"

namespace moesaic::formats {

/// Architectures llama (mistral too), qwen2, qwen3 and gemma3. What llama.cpp's converter changed is undone: the rows
/// of llama's q and k are put back in order, gemma's norm weights lose their + 1.
/// Throws FormatError, or DataError for an architecture that is not supported.
std::shared_ptr<Checkpoint> open_gguf(const std::filesystem::path& path);
/// The same from memory.
std::shared_ptr<Checkpoint> open_gguf(Bytes bytes);

/// A tensor as it lies in the file, for the fingerprint.
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string_view bytes;
};

/// Checkpoint::fingerprint's value. `stored` must be callable from several threads.
std::string fingerprint_of(const std::vector<std::string>& names,
                           const std::function<StoredTensor(const std::string&)>& stored);

}  // namespace moesaic::formats
