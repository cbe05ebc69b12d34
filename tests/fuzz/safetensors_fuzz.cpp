// Any bytes as a .safetensors file: either it parses and every tensor can be read, or Error is thrown.
#include <ATen/ATen.h>

#include "moesaic/base/check.h"
#include "moesaic/formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  try {
    const formats::SafetensorsFile file(
        formats::Bytes::from_string({reinterpret_cast<const char*>(data), size}, "fuzz"));
    for (const auto& name : file.names()) {
      const at::Tensor copy = file.tensor(name).clone();
      if (copy.nbytes() != file.bytes(name).size()) __builtin_trap();
    }
  } catch (const Error&) {
  }
  return 0;
}
