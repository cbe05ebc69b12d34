// A GGUF file seen as a Hugging Face checkpoint: config, tensor names and layouts, tokenizer.
#pragma once
#include <functional>
#include <optional>
#include <span>

#include "moesaic/formats/bytes.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/gguf.h"

namespace moesaic::formats {

/// The metadata of a model: what stands under the name of its architecture ("llama.block_count").
class GgufMetadata {
 public:
  /// `file` must outlive this.
  explicit GgufMetadata(const GgufFile& file);

  /// general.architecture; "" when absent.
  const std::string& arch() const { return arch_; }
  std::string key(const char* name) const { return arch_ + "." + name; }
  /// The value of key(name); nullopt when absent. Throws FormatError when it is no natural number up to 2^30.
  std::optional<int64_t> find_size(const char* name) const;
  /// Throws FormatError when it is not finite.
  std::optional<double> find_number(const char* name) const;
  /// `name` in llama.cpp's words ("blk.0.attn_q.bias").
  bool has_tensor(std::string_view name) const;

 private:
  const GgufFile& file_;
  std::string arch_;
};

/// What llama.cpp calls a part of a layer, and what the model does.
struct GgufName {
  const char* gguf;
  const char* hf;
};

/// One of llama.cpp's architectures: how a family of models lies in a GGUF file.
struct GgufArchitecture {
  const char* name;                 // general.architecture
  std::span<const GgufName> norms;  // of a layer, beside attn_norm and those of queries and keys
  bool interleaved_heads = false;   // its converter interleaves the two halves of each head's rows of q and k
  bool norms_plus_one = false;      // its converter stores 1 + w for the weight w of every norm
  /// Adds config.json's keys of this family, `model_type` and `architectures` among them, to those that all have.
  void (*complete)(const GgufMetadata& metadata, Json& config);
};

/// llama.cpp's name of a tensor ("blk.0.attn_q.weight") that Hugging Face calls `hf` ("model.layers.0.self_attn.q_proj.
/// weight"; stacks of experts "model.layers.0.mlp.experts.gate_proj.weight"); "" when it has none.
std::string gguf_name(const std::string& hf, const GgufArchitecture& architecture);

/// A GGUF file as a checkpoint; what llama.cpp's converter changed is undone. `known` must live as long.
/// Throws FormatError, or DataError for an architecture that is none of `known`.
std::shared_ptr<Checkpoint> open_gguf(Bytes bytes, std::span<const GgufArchitecture* const> known);

/// A tensor as it lies in the file, for the fingerprint.
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string_view bytes;
  at::Tensor kept{};  // holds the bytes where the file's own are in another order
};

/// Checkpoint::fingerprint's value. `stored` must be callable from several threads.
std::string fingerprint_of(const std::vector<std::string>& names,
                           const std::function<StoredTensor(const std::string&)>& stored);

}  // namespace moesaic::formats
