#include "moesaic/formats/gguf_tokenizer.h"

namespace moesaic::formats {

std::optional<std::string> gguf_tokenizer_json(const GgufFile& file) { return std::nullopt; }
Json gguf_tokenizer_config(const GgufFile& file) { return Json::object(); }

}  // namespace moesaic::formats
