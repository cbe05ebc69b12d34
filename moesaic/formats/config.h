// config.json in one shape, however old the writer was.
#pragma once
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::formats {

/// Brings a config.json (as transformers 4 or 5 writes it) into transformers 5's shape:
///  - `text_config` of a multi-modal model replaces the whole; token ids, dtype and tying are kept from outside;
///  - `dtype` ("float32", "bfloat16", ...) replaces `torch_dtype`;
///  - `rope_parameters` {"rope_type", "rope_theta", "factor", ...} replaces `rope_theta` and `rope_scaling`. Always
///    there, with the numbers that are given; `original_max_position_embeddings` is filled for llama3 and yarn. Where
///    `rope_local_base_freq` or both kinds of layer are named there is one such object for each:
///    {"full_attention": {...}, "sliding_attention": {...}}.
/// Other keys stay as they are: what they mean, and what is assumed where they are silent, is models' to say. Throws
/// ConfigError when the shape can't be brought about.
Json normalise_config(Json config, const std::string& where);

/// The reverse, for readers older than transformers 5: adds `rope_theta`, `rope_scaling` (and gemma3's
/// `rope_local_base_freq`) beside `rope_parameters`.
Json with_legacy_rope_keys(Json config);

}  // namespace moesaic::formats
