// config.json and adapter_config.json: any bytes give a config or an Error. Normalising twice changes nothing, and the
// keys for older readers mean the same.
#include <cstdint>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/config.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"

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
    const Json config = formats::normalise_config(json, "fuzz");
    if (formats::normalise_config(config, "fuzz") != config) __builtin_trap();
    const Json legacy = formats::with_legacy_rope_keys(config);
    if (formats::normalise_config(legacy, "fuzz")["rope_parameters"] != config["rope_parameters"]) __builtin_trap();
    models::parse_decoder_config(config, "fuzz");
  } catch (const Error&) {
  }
  try {
    models::parse_decoder_config(json, "fuzz");
  } catch (const Error&) {
  }
  try {
    models::parse_seq2seq_config(json, "fuzz");
  } catch (const Error&) {
  }
  try {
    adapters::parse_adapter_config(json, "fuzz");
  } catch (const Error&) {
  }
  return 0;
}
