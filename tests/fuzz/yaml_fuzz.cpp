// YAML and key=value overrides: any bytes give a value or an Error, and what is read survives to_yaml.
#include <cstdint>
#include <cstdlib>

#include "moesaic/base/yaml.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    OrderedJson config = parse_yaml(text, "fuzz");
    if (parse_yaml(to_yaml(config), "again") != config) std::abort();
    check_known_keys(Json(config), {"seed", "router.type", "columns.*"}, "fuzz");
  } catch (const Error&) {
  }
  try {
    OrderedJson config = {{"seed", 1}, {"router", {{"type", "soft"}}}};
    apply_overrides(config, {text});
  } catch (const Error&) {
  }
  return 0;
}
