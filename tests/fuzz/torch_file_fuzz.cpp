// Any bytes as a torch.save file: either every tensor can be read, or Error is thrown.
#include <ATen/ATen.h>

#include "moesaic/base/check.h"
#include "moesaic/formats/torch_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  try {
    const auto bytes = formats::Bytes::from_string({reinterpret_cast<const char*>(data), size}, "fuzz");
    for (const auto& [name, tensor] : formats::read_torch_file(bytes)) {
      if (tensor.clone().nbytes() > size) __builtin_trap();
    }
  } catch (const Error&) {
  }
  return 0;
}
