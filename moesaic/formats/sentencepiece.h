// SentencePiece's vocabularies ("spiece.model") as tokenizer.json.
#pragma once
#include <string>

#include "moesaic/formats/bytes.h"

namespace moesaic::formats {

/// tokenizer.json's text of a unigram vocabulary, built as transformers' T5Tokenizer is: texts normalised by the file's
/// own table, words cut at white space, each with its mark; </s> put behind a text; <extra_id_{n-1}> .. <extra_id_0>,
/// n = `extra_ids`, behind the file's pieces. Control symbols are special, user-defined ones plain added tokens.
/// The file is a protocol buffer (ModelProto); lengths and counts are checked. Throws FormatError for damage, DataError
/// for a vocabulary of another kind or without T5's </s>.
std::string sentencepiece_tokenizer_json(const Bytes& file, int64_t extra_ids);

}  // namespace moesaic::formats
