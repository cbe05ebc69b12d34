// The families of models: what is read, by config.json's model_type or a GGUF file's architecture.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/formats/bytes.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/gguf_checkpoint.h"
#include "moesaic/models/decoder_config.h"
#include "moesaic/models/seq2seq_lm.h"

namespace moesaic::models {

/// Whether config.json is of a decoder, else of an encoder-decoder. Throws ConfigError for an unknown model_type.
bool is_decoder(const Json& config, const std::string& where);
/// Parses config.json (as transformers 4 and 5 write it) of any registered family of decoders.
/// Throws ConfigError for an encoder-decoder, an unknown model_type (with the known ones) or impossible values (zero,
/// negative, NaN, huge).
DecoderConfig parse_decoder_config(const Json& config, const std::string& where);
/// The same of encoder-decoders.
Seq2SeqConfig parse_seq2seq_config(const Json& config, const std::string& where);
/// Loads a model of any family: each tensor of the file is used once and each parameter gets one, or DataError lists
/// all that do not fit.
std::shared_ptr<SingleModel> load_model(const formats::Checkpoint& checkpoint, const LoadOptions& options = {});
/// The model of a config.json with uninitialised weights; on device kMeta names and shapes alone.
std::shared_ptr<SingleModel> make_model(const Json& config, const std::string& where,
                                        const torch::TensorOptions& options);
/// The registered model_type names.
std::vector<std::string> known_model_types();

/// How models of this config.json lie in a GGUF file. Throws UsageError for a family that llama.cpp's files don't know
/// here.
const formats::GgufArchitecture& gguf_architecture(const Json& config, const std::string& where);

/// Opens a folder with config.json, or a .gguf file of a registered architecture. With `weights` false only the config
/// of a folder is read (one without weights is fine). Throws DataError / FormatError with a hint.
std::shared_ptr<formats::Checkpoint> open_checkpoint(const std::filesystem::path& path, bool weights = true);
/// A GGUF file that is in memory.
std::shared_ptr<formats::Checkpoint> open_gguf(formats::Bytes bytes);

}  // namespace moesaic::models
