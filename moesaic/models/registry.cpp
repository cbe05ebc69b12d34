#include "moesaic/models/registry.h"

#include "moesaic/formats/config.h"
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

struct Family {
  const char* model_type;
  DecoderConfig (*parse)(ConfigReader& reader);  // nullptr: an encoder-decoder
  const formats::GgufArchitecture* gguf = nullptr;
  Seq2SeqConfig (*parse_seq2seq)(ConfigReader& reader) = nullptr;
};

const Family kFamilies[] = {
    {"gemma", parse_gemma, &kGemmaGguf},
    {"gemma2", parse_gemma2, &kGemma2Gguf},
    {"gemma3_text", parse_gemma3, &kGemma3Gguf},
    {"granitemoe", parse_granitemoe, &kGraniteMoeGguf},
    {"granitemoeshared", parse_granitemoeshared, &kGraniteMoeGguf},
    {"llama", parse_llama, &kLlamaGguf},
    {"mistral", parse_mistral, &kLlamaGguf},
    {"mixtral", parse_mixtral, &kLlamaGguf},
    {"mt5", nullptr, nullptr, parse_mt5},
    {"olmoe", parse_olmoe, &kOlmoeGguf},
    {"qwen2", parse_qwen2, &kQwen2Gguf},
    {"qwen2_moe", parse_qwen2_moe, &kQwen2MoeGguf},
    {"qwen3", parse_qwen3, &kQwen3Gguf},
    {"qwen3_moe", parse_qwen3_moe, &kQwen3MoeGguf},
    {"switch_transformers", nullptr, nullptr, parse_switch},
    {"t5", nullptr, nullptr, parse_t5},
    {"t5gemma", nullptr, nullptr, parse_t5gemma},
    {"t5gemma2", nullptr, nullptr, parse_t5gemma2},
    {"umt5", nullptr, nullptr, parse_umt5},
};

/// The family of a normalised config.
const Family& family_of(const Json& config, const std::string& where) {
  const std::string model_type = get<std::string>(config, "model_type", where);
  for (const Family& family : kFamilies) {
    if (model_type == family.model_type) return family;
  }
  const auto names = known_model_types();
  const std::string near = nearest_name(model_type, names);
  throw ConfigError(fmt::format("{}: model_type: got \"{}\", expected one of {}{}", where, model_type,
                                fmt::join(names, ", "), near.empty() ? "" : ". Did you mean " + near + "?"));
}

/// `parser`: of a family, null where it is of the other kind.
template <class Config>
Config parsed(Config (*Family::*parser)(ConfigReader&), const Json& written, const std::string& where, const char* kind,
              const char* other) {
  const Json config = formats::normalise_config(written, where);
  const Family& family = family_of(config, where);
  MOESAIC_CHECK(family.*parser != nullptr, ConfigError, "{}: model_type: got \"{}\", {}, expected {}", where,
                family.model_type, other, kind);
  ConfigReader reader(config, where);
  Config result = (family.*parser)(reader);
  reader.finish();
  return result;
}

constexpr const char *kDecoder = "a decoder", *kEncoderDecoder = "an encoder-decoder";

}  // namespace

bool is_decoder(const Json& written, const std::string& where) {
  return family_of(formats::normalise_config(written, where), where).parse != nullptr;
}

std::vector<std::string> known_model_types() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies) names.push_back(family.model_type);
  return names;
}

DecoderConfig parse_decoder_config(const Json& written, const std::string& where) {
  return parsed(&Family::parse, written, where, kDecoder, kEncoderDecoder);
}

Seq2SeqConfig parse_seq2seq_config(const Json& written, const std::string& where) {
  return parsed(&Family::parse_seq2seq, written, where, kEncoderDecoder, kDecoder);
}

std::shared_ptr<SingleModel> load_model(const formats::Checkpoint& checkpoint, const LoadOptions& options) {
  if (is_decoder(checkpoint.config(), checkpoint.path().string())) return CausalLM::load(checkpoint, options);
  return Seq2SeqLM::load(checkpoint, options);
}

std::shared_ptr<SingleModel> make_model(const Json& written, const std::string& where,
                                        const torch::TensorOptions& options) {
  if (is_decoder(written, where)) return std::make_shared<CausalLM>(parse_decoder_config(written, where), options);
  return std::make_shared<Seq2SeqLM>(parse_seq2seq_config(written, where), options);
}

const formats::GgufArchitecture& gguf_architecture(const Json& config, const std::string& where) {
  const Family& family = family_of(config, where);
  MOESAIC_CHECK(family.gguf != nullptr, UsageError, "{}: {} models can't be written for llama.cpp", where,
                family.model_type);
  return *family.gguf;
}

std::shared_ptr<formats::Checkpoint> open_gguf(formats::Bytes bytes) {
  static const auto known = [] {
    std::vector<const formats::GgufArchitecture*> rows;
    for (const Family& family : kFamilies) {
      if (family.gguf && std::find(rows.begin(), rows.end(), family.gguf) == rows.end()) rows.push_back(family.gguf);
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
