// An adapter folder: the text up to the first NUL is adapter_config.json, the rest adapter_model.safetensors.
#include "moesaic/base/check.h"
#include "moesaic/formats/adapter_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::string_view config = input.substr(0, input.find('\0'));
  const std::string_view tensors = input.substr(std::min(size, config.size() + 1));
  try {
    formats::parse_adapter(config, formats::Bytes::from_string(std::string(tensors), "fuzz"), "fuzz");
  } catch (const Error&) {
  }
  return 0;
}
