// A tokenizer of nine tokens, written out.
#pragma once
#include <memory>

#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::tokenizer {

// BPE with byte fallback: 'a' + 'b' merge to "ab"; é is the two bytes C3 A9. With special tokens: <bos> $A.
inline constexpr const char* kTinyJson = R"({
  "version": "1.0",
  "added_tokens": [
    {"id": 0, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
    {"id": 1, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
  ],
  "post_processor": {"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}},
  "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
  "model": {"type": "BPE", "byte_fallback": true, "merges": [["a", "b"]],
    "vocab": {"<eos>": 0, "<bos>": 1, "a": 2, "b": 3, " ": 4, "<0xC3>": 5, "<0xA9>": 6, "ab": 7, "\n": 8}}
})";

inline std::shared_ptr<Tokenizer> tiny_tokenizer() {
  return std::make_shared<Tokenizer>(kTinyJson, Json{{"bos_token", "<bos>"}, {"eos_token", {{"content", "<eos>"}}}},
                                     "tiny");
}

}  // namespace moesaic::tokenizer
