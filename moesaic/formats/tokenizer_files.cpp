#include "moesaic/formats/tokenizer_files.h"

#include "moesaic/formats/sentencepiece.h"

namespace moesaic::formats {
namespace {

namespace fs = std::filesystem;
constexpr const char* kTokenizer = "tokenizer.json";
constexpr const char* kPieces = "spiece.model";
constexpr const char* kConfig = "tokenizer_config.json";
constexpr const char* kTemplate = "chat_template.jinja";
constexpr const char* kTemplates = "additional_chat_templates";
constexpr size_t kMostTemplateBytes = size_t{16} << 20, kMostConfigBytes = size_t{64} << 20;
constexpr int64_t kExtraIds = 100, kMostExtraIds = 100'000;  // T5's sentinels

/// A text, or a list of {name, template}.
ChatTemplates templates_of(const Json& value, const std::string& where) {
  ChatTemplates templates;
  if (value.is_string()) templates["default"] = value.get<std::string>();
  if (!value.is_array()) return templates;
  for (const Json& named : value) {
    const bool fits =
        named.is_object() && named.value("name", Json()).is_string() && named.value("template", Json()).is_string();
    MOESAIC_CHECK(fits, FormatError, "{}: chat_template holds {}, expected {{\"name\": ..., \"template\": ...}}", where,
                  named.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80));
    templates[named["name"].get<std::string>()] = named["template"].get<std::string>();
  }
  return templates;
}

/// A template's name is a file's in `kTemplates`.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() < 200 && name[0] != '.' && name.find_first_of("/\\") == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

Json read_optional_json(const fs::path& file) {
  if (!is_there(file)) return Json::object();
  Json json = read_json(file, kMostConfigBytes);
  MOESAIC_CHECK(json.is_object(), FormatError, "{}: is not a JSON object", file.string());
  return json;
}

std::optional<std::string> read_tokenizer_json(const fs::path& folder) {
  if (is_there(folder / kTokenizer)) return read_file(folder / kTokenizer, size_t{256} << 20);
  if (!is_there(folder / kPieces)) return std::nullopt;
  const Json config = read_optional_json(folder / kConfig);
  const auto extra_ids = get_or<int64_t>(config, "extra_ids", kExtraIds, (folder / kConfig).string());
  MOESAIC_CHECK(extra_ids >= 0 && extra_ids <= kMostExtraIds, FormatError, "{}: extra_ids: got {}, expected 0 to {}",
                (folder / kConfig).string(), extra_ids, kMostExtraIds);
  return sentencepiece_tokenizer_json(Bytes::map(folder / kPieces), extra_ids);
}

Json read_tokenizer_config(const fs::path& folder) {
  Json config = read_optional_json(folder / kConfig);
  if (!config.contains("added_tokens_decoder")) config.update(read_optional_json(folder / "special_tokens_map.json"));
  for (auto& [key, value] : config.items()) {
    if (key.ends_with("_token") && value.is_object() && value.contains("content")) value = Json(value["content"]);
  }
  if (!is_there(folder / kTokenizer) && is_there(folder / kPieces)) {
    for (const auto& [key, token] : {std::pair("eos_token", "</s>"), {"unk_token", "<unk>"}, {"pad_token", "<pad>"}}) {
      if (!config.contains(key)) config[key] = token;
    }
  }
  return config;
}

ChatTemplates read_chat_templates(const fs::path& folder) {
  ChatTemplates templates;
  if (is_there(folder / kTemplate)) templates["default"] = read_file(folder / kTemplate, kMostTemplateBytes);
  if (fs::is_directory(folder / kTemplates)) {
    for (const auto& entry : fs::directory_iterator(folder / kTemplates)) {
      if (entry.path().extension() != ".jinja") continue;
      templates[entry.path().stem().string()] = read_file(entry.path(), kMostTemplateBytes);
    }
  }
  for (const char* name : {"chat_template.json", kConfig}) {
    if (!templates.empty()) break;
    const Json json = read_optional_json(folder / name);
    if (json.contains("chat_template")) templates = templates_of(json["chat_template"], (folder / name).string());
  }
  return templates;
}

TokenizerFiles read_tokenizer_files(const fs::path& folder) {
  TokenizerFiles files;
  files.json = read_tokenizer_json(folder);
  files.config = read_tokenizer_config(folder);
  files.chat_templates = read_chat_templates(folder);
  return files;
}

void adapt(TokenizerFiles& base, const fs::path& adapter_folder, bool embeds) {
  fs::path folder = adapter_folder.lexically_normal();
  if (!folder.has_filename()) folder = folder.parent_path();  // "run/checkpoint-5/"
  const bool checkpoint = folder.filename().string().starts_with("checkpoint-");
  if (checkpoint && !is_there(folder / kTemplate) && !is_there(folder / kConfig)) folder = folder / "..";
  if (embeds && is_there(folder / kTokenizer)) {
    TokenizerFiles own = read_tokenizer_files(folder);
    base.json = std::move(own.json);
    if (!own.config.empty()) base.config = std::move(own.config);
  }
  if (auto own = read_chat_templates(folder); !own.empty()) {
    base.chat_templates = own == kNoTemplate ? ChatTemplates() : std::move(own);
  }
  const Json own_config = read_tokenizer_config(folder);  // outlives the loop over it
  for (const auto& [key, value] : own_config.items()) {
    const bool how = key == "add_eos_token" && value.is_boolean();  // what the adapter's prompts ended in
    if (how || (key.ends_with("_token") && value.is_string())) base.config[key] = value;
  }
}

void write_tokenizer_files(const fs::path& folder, const TokenizerFiles& files) {
  for (const auto& [name, source] : files.chat_templates) {
    MOESAIC_CHECK(is_plain_name(name), DataError, "{}: a chat template is named '{}', which is no file's name",
                  folder.string(), name.substr(0, 80));
  }
  if (files.json) write_file_atomically(folder / kTokenizer, *files.json);
  Json config = files.config;
  config.erase("chat_template");
  if (!config.empty()) write_file_atomically(folder / kConfig, config.dump(2) + "\n");
  for (const auto& [name, source] : files.chat_templates) {
    if (name != "default") fs::create_directories(folder / kTemplates);
    write_file_atomically(name == "default" ? folder / kTemplate : folder / kTemplates / (name + ".jinja"), source);
  }
}

}  // namespace moesaic::formats
