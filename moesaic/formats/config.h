// config.json in one shape, however old the writer was.
#pragma once
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::formats {

/// A key of our own beside `rope_parameters`: what cos and sin of every layer are multiplied by (GGUF's attn_factor),
/// which transformers has for yarn alone.
inline constexpr const char* kRopeMagnitude = "moesaic_rope_attention_factor";

/// Brings a config.json (as transformers 4 or 5 writes it) into transformers 5's shape:
///  - `text_config` of a multi-modal model replaces the whole; token ids, dtype and tying are kept from outside;
///  - `dtype` ("float32", "bfloat16", ...) replaces `torch_dtype`;
///  - `rope_parameters` {"rope_type", "rope_theta", "factor", ...} replaces `rope_theta` and `rope_scaling`; where a
///    file has both, `rope_scaling` is what counts, with the file's `rope_theta`, as in transformers. Always
///    there, with the numbers that are given; `original_max_position_embeddings` is filled for llama3 and yarn. Where
///    `rope_local_base_freq` or both kinds of layer are named there is one such object for each:
///    {"full_attention": {...}, "sliding_attention": {...}}.
/// Other keys stay as they are: what they mean, and what is assumed where they are silent, is models' to say. Throws
/// ConfigError when the shape can't be brought about.
Json normalise_config(Json config, const std::string& where);

/// The reverse, for readers older than transformers 5: adds `rope_theta`, `rope_scaling` (and gemma3's
/// `rope_local_base_freq`) beside `rope_parameters`.
Json with_legacy_rope_keys(Json config);

/// The name that a tensor of a multi-modal model has in the language model alone ("model.layers..."), in the spelling
/// of transformers 4.52 and later as in that before it; "" for a tensor that is not the language model's, and every
/// other name as it is.
std::string language_model_name(const std::string& name);
/// How `name` begins where language_model_name changes it: "model.language_model.", "language_model.", or "".
std::string multi_modal_spelling(const std::string& name);
/// The inverse of language_model_name for names of one spelling.
std::string spelled(const std::string& spelling, const std::string& name);

}  // namespace moesaic::formats
