// tokenizer.json: any text either opens, and then encodes, decodes and streams, or is refused.
#include "moesaic/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic::tokenizer;
  try {
    const auto tokenizer = std::make_shared<Tokenizer>(std::string_view(reinterpret_cast<const char*>(data), size),
                                                       moesaic::Json{{"eos_token", "</s>"}}, "fuzz");
    const std::vector<int64_t> ids = tokenizer->encode(
        "the c\xC3\xA9"
        "dille </s> \xF0\x9F\x91\x8D 12  \n",
        true);
    tokenizer->decode(ids, false);
    StreamDecoder stream(tokenizer);
    for (int64_t id : ids) stream.push(id);
    stream.finish();
  } catch (const moesaic::DataError&) {
  }
  return 0;
}
