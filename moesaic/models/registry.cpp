#include "moesaic/models/registry.h"

#include "moesaic/formats/config.h"
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

struct Family {
  const char* model_type;
  DecoderConfig (*parse)(ConfigReader& reader);
  const formats::GgufArchitecture* gguf = nullptr;
};

const Family kFamilies[] = {
    {"gemma", parse_gemma, &kGemmaGguf},
    {"gemma2", parse_gemma2, &kGemma2Gguf},
    {"gemma3_text", parse_gemma3, &kGemma3Gguf},
    {"llama", parse_llama, &kLlamaGguf},
    {"mistral", parse_mistral},  // in a GGUF file a llama with a window
    {"qwen2", parse_qwen2, &kQwen2Gguf},
    {"qwen3", parse_qwen3, &kQwen3Gguf},
};

}  // namespace

std::vector<std::string> known_model_types() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies) names.push_back(family.model_type);
  return names;
}

DecoderConfig parse_decoder_config(const Json& written, const std::string& where) {
  const Json config = formats::normalise_config(written, where);
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

std::shared_ptr<formats::Checkpoint> open_gguf(formats::Bytes bytes) {
  static const auto known = [] {
    std::vector<const formats::GgufArchitecture*> rows;
    for (const Family& family : kFamilies) {
      if (family.gguf) rows.push_back(family.gguf);
    }
    return rows;
  }();
  return formats::open_gguf(std::move(bytes), known);
}

std::shared_ptr<formats::Checkpoint> open_checkpoint(const std::filesystem::path& path, bool weights) {
  MOESAIC_CHECK(formats::is_there(path), DataError,
                "{}: no such file or folder; expected a model folder or a .gguf file", path.string());
  if (std::filesystem::is_directory(path)) return formats::open_folder(path, weights);
  if (path.extension() == ".safetensors" || path.filename() == "config.json") {
    throw DataError(fmt::format("{}: is one file of a model folder; give the folder '{}'", path.string(),
                                path.parent_path().string()));
  }
  return open_gguf(formats::Bytes::map(path));
}

}  // namespace moesaic::models
