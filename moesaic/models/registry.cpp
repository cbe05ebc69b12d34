// The decoder families by config.json's model_type.
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

struct Family {
  const char* model_type;
  DecoderConfig (*parse)(ConfigReader& reader);
};

constexpr Family kFamilies[] = {
    {"gemma", parse_gemma},     {"gemma2", parse_gemma2}, {"gemma3_text", parse_gemma3}, {"llama", parse_llama},
    {"mistral", parse_mistral}, {"qwen2", parse_qwen2},   {"qwen3", parse_qwen3},
};

}  // namespace

std::vector<std::string> known_model_types() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies) names.push_back(family.model_type);
  return names;
}

DecoderConfig parse_decoder_config(const Json& config, const std::string& where) {
  MOESAIC_CHECK(config.is_object(), ConfigError, "{}: got {}, expected a JSON object", where, config.type_name());
  const std::string model_type = get<std::string>(config, "model_type", where);
  for (const Family& family : kFamilies) {
    if (model_type != family.model_type) continue;
    ConfigReader reader(config, where);
    DecoderConfig parsed = family.parse(reader);
    reader.finish();
    return parsed;
  }
  const auto names = known_model_types();
  const std::string near = nearest_name(model_type, names);
  throw ConfigError(fmt::format("{}: model_type: got \"{}\", expected one of {}{}", where, model_type,
                                fmt::join(names, ", "), near.empty() ? "" : ". Did you mean " + near + "?"));
}

}  // namespace moesaic::models
