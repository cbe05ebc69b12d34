// Any bytes as a GGUF file: metadata, config, tokenizer and every tensor, or Error.
#include <ATen/ATen.h>
#include <spdlog/spdlog.h>

#include "moesaic/base/check.h"
#include "moesaic/models/registry.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  spdlog::set_level(spdlog::level::off);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  try {
    const auto checkpoint =
        models::open_gguf(formats::Bytes::from_string({reinterpret_cast<const char*>(data), size}, "fuzz"));
    for (const auto& name : checkpoint->names()) {
      at::Tensor read = at::empty(checkpoint->shape(name), at::kFloat);
      checkpoint->read_into(name, read);
      if (checkpoint->tensor(name).scalar_type() != checkpoint->dtype(name)) __builtin_trap();
    }
    checkpoint->fingerprint();
    checkpoint->generation_config();
    checkpoint->chat_templates();
    checkpoint->tokenizer_config();
    if (const auto tokenizer = checkpoint->tokenizer_json()) parse_json(*tokenizer, "tokenizer.json");
  } catch (const Error&) {
  }
  return 0;
}
