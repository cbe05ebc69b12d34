// Any bytes as a spiece.model: tokenizer.json's text, or Error.
#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/sentencepiece.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  try {
    const auto bytes = formats::Bytes::from_string({reinterpret_cast<const char*>(data), size}, "fuzz");
    parse_json(formats::sentencepiece_tokenizer_json(bytes, 2), "tokenizer.json");
  } catch (const Error&) {
  }
  return 0;
}
