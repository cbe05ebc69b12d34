// Chat templates: any source either compiles and renders within its budget, or is refused.
#include "moesaic/tokenizer/tokenizer.h"

namespace {

constexpr const char* kTokenizer = R"({"version": "1.0", "added_tokens": [],
  "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic::tokenizer;
  static const Tokenizer tokenizer(kTokenizer, {{"bos_token", "<s>"}, {"eos_token", "</s>"}}, "fuzz");
  static const auto messages = moesaic::OrderedJson::parse(
      R"([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
          {"role": "user", "content": [{"type": "text", "text": "t"}]}, {"role": "assistant", "content": "b"}])");
  try {
    const ChatTemplate chat(std::string(reinterpret_cast<const char*>(data), size), tokenizer);
    chat.render_for_training(messages);
  } catch (const moesaic::DataError&) {
  }
  return 0;
}
