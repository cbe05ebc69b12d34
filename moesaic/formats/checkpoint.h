// A pretrained model as files: a Hugging Face folder (config.json + safetensors, single or sharded) or one GGUF file.
// Both look the same from outside: a config in config.json's words and tensors under Hugging Face's names.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/device.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/tokenizer_files.h"

namespace moesaic::formats {

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  /// The path that was given.
  const std::filesystem::path& path() const { return path_; }
  /// config.json, normalised to transformers 5's keys (`rope_parameters`, `dtype`, the text part of a multi-modal
  /// model; see normalise_config); GGUF metadata is translated to it.
  const Json& config() const { return config_; }
  /// Names in Hugging Face's words ("model.layers.0.self_attn.q_proj.weight"), sorted. A multi-modal model's prefixes
  /// are taken off and its vision tensors hidden; a model saved without its head gets its "model." back.
  virtual std::vector<std::string> names() const = 0;
  virtual bool contains(const std::string& name) const = 0;
  virtual std::vector<int64_t> shape(const std::string& name) const = 0;
  /// The dtype the tensor has after loading (quantised GGUF types load as float32).
  virtual at::ScalarType dtype(const std::string& name) const = 0;
  /// What the file holds: "float32", "bfloat16", ..., or ggml's name of a quantised type ("Q4_1").
  virtual std::string stored_type(const std::string& name) const { return dtype_name(dtype(name)); }
  /// The tensor as stored (a read-only view of the mapped file), or dequantised to float32.
  virtual at::Tensor tensor(const std::string& name) const = 0;
  /// Copies (dequantises, converts) the tensor into `destination`, which has its shape; any float dtype, any strides.
  virtual void read_into(const std::string& name, at::Tensor destination) const = 0;
  /// tokenizer.json's text: the file, or made from GGUF metadata. nullopt when there is none.
  virtual std::optional<std::string> tokenizer_json() const = 0;
  /// tokenizer_config.json (bos_token, eos_token, add_bos_token, ...); GGUF metadata is translated to it.
  virtual Json tokenizer_config() const = 0;
  /// The chat templates of the folder's files, or GGUF's tokenizer.chat_template and tokenizer.chat_template.NAME.
  virtual ChatTemplates chat_templates() const = 0;
  /// The three together, for writing elsewhere.
  TokenizerFiles tokenizer_files() const { return {tokenizer_json(), tokenizer_config(), chat_templates()}; }
  /// generation_config.json, or {}.
  virtual Json generation_config() const = 0;
  /// "sha256-all:..." over every tensor's name, dtype, shape and bytes. Remembered while the files do not change.
  virtual std::string fingerprint() const = 0;

 protected:
  std::filesystem::path path_;
  Json config_;
};

/// False when two fingerprints are of different weights. Older versions' ("sha256:...", over a sample of the bytes) are
/// no answer to new ones.
bool may_be_same_weights(const std::string& fingerprint, const std::string& other);

/// A folder with config.json. With `weights` false only the config is read (a folder without weights is fine).
/// Throws DataError / FormatError with a hint. models::open_checkpoint opens GGUF files too.
std::shared_ptr<Checkpoint> open_folder(const std::filesystem::path& path, bool weights = true);

}  // namespace moesaic::formats
