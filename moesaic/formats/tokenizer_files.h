// What stands beside a model's weights about its texts: the tokenizer, its special tokens and its chat templates.
#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::formats {

/// Templates by name; the one for every conversation is called "default".
using ChatTemplates = std::map<std::string, std::string>;

/// What a folder holds that asks for raw text, whatever template its base has: an empty chat_template.jinja.
inline const ChatTemplates kNoTemplate{{"default", ""}};

/// One tokenizer. What a folder lacks is empty.
struct TokenizerFiles {
  std::optional<std::string> json;  // the text of tokenizer.json
  Json config = Json::object();     // tokenizer_config.json with special_tokens_map.json in it; tokens as their texts
  ChatTemplates chat_templates{};
};

/// A JSON object that a folder may lack: {} then. Throws FormatError.
Json read_optional_json(const std::filesystem::path& file);

/// The text of tokenizer.json in `folder`, or what T5's spiece.model means; nullopt when it has neither.
/// Throws FormatError, or DataError for a spiece.model that is not T5's.
std::optional<std::string> read_tokenizer_json(const std::filesystem::path& folder);

/// tokenizer_config.json of `folder`. As in transformers, special_tokens_map.json has the last word, unless
/// added_tokens_decoder says all there is; where the tokenizer is a spiece.model, T5's special tokens are named.
/// Throws FormatError.
Json read_tokenizer_config(const std::filesystem::path& folder);

/// The templates of `folder`: chat_template.jinja and additional_chat_templates/NAME.jinja, or, where it has neither,
/// chat_template.json's or tokenizer_config.json's, one or a list of named ones. Throws FormatError.
ChatTemplates read_chat_templates(const std::filesystem::path& folder);

/// Everything of `folder`.
TokenizerFiles read_tokenizer_files(const std::filesystem::path& folder);

/// Puts what an adapter's folder (of a checkpoint: its run's) brings of its own in the place of its base's: its chat
/// templates, or that it has none (kNoTemplate), and the special tokens its tokenizer_config.json names. The vocabulary
/// stays the base's, unless the adapter brings the embedding, too (`embeds`), and a tokenizer.json for it.
void adapt(TokenizerFiles& base, const std::filesystem::path& adapter_folder, bool embeds = false);

/// Writes what there is into `folder`, the templates as files of their own, as transformers does. Throws DataError.
void write_tokenizer_files(const std::filesystem::path& folder, const TokenizerFiles& files);

}  // namespace moesaic::formats
