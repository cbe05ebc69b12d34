// config.json and adapter_config.json: any bytes give a config or an Error.
#include <cstdint>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/json.h"
#include "moesaic/models/causal_lm.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  Json json;
  try {
    json = parse_json(text, "fuzz");
  } catch (const Error&) {
    return 0;
  }
  try {
    models::parse_decoder_config(json, "fuzz");
  } catch (const Error&) {
  }
  try {
    adapters::parse_adapter_config(json, "fuzz");
  } catch (const Error&) {
  }
  return 0;
}
