// A GGUF file's tokenizer.ggml.* metadata as Hugging Face's tokenizer files.
#pragma once
#include <optional>
#include <string>

#include "moesaic/base/json.h"
#include "moesaic/formats/gguf.h"
#include "moesaic/formats/tokenizer_files.h"

namespace moesaic::formats {

/// tokenizer.json's text; nullopt when the file has no vocabulary.
///  - model `gpt2`: byte-level BPE with the pre-tokenizer that `tokenizer.ggml.pre` names;
///  - model `llama`: SentencePiece-style BPE with byte fallback. Merges are taken from the file or derived: every split
///    of a piece into two pieces, best score first (gemma: earliest piece first), as transformers does.
/// Control tokens become special, user-defined ones plain added tokens; the post-processor follows add_bos_token and
/// add_eos_token. Throws FormatError, or DataError for a kind or pre-tokenizer that is not known.
std::optional<std::string> gguf_tokenizer_json(const GgufFile& file);

/// tokenizer_config.json: bos/eos/unk/pad tokens, add_bos_token, add_eos_token.
Json gguf_tokenizer_config(const GgufFile& file);

/// tokenizer.chat_template as "default" and each tokenizer.chat_template.NAME.
ChatTemplates gguf_chat_templates(const GgufFile& file);

}  // namespace moesaic::formats
