#include "moesaic/formats/gguf_tokenizer.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <unordered_map>

namespace moesaic::formats {
namespace {

constexpr size_t kMaxTokenBytes = 1024;                  // deriving merges takes time proportional to its square
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

constexpr const char* kPreKey = "tokenizer.ggml.pre";

// tokenizer.ggml.token_type
constexpr double kControl = 3, kUserDefined = 4;

// Pre-tokenizer expressions of the models' own tokenizer.json files; GPT-2's is built into ByteLevel.
constexpr const char* kLlama3Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekkenSplit = R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
                                     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
                                     R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepseekV3Split =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|)"
    R"( ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// How byte-level text is cut before BPE.
struct PreTokenizer {
  std::vector<const char*> names;   // values of tokenizer.ggml.pre
  std::vector<const char*> splits;  // applied one after the other; empty = GPT-2's own
  bool digits = false;              // every digit alone, before GPT-2's
  bool nfc = false;                 // the model's tokenizer normalises to NFC
  bool ignore_merges = false;       // a word that is a token stays whole
  bool add_bos = false;             // when the file doesn't say
};

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> kAll = {
      {.names = {"gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo", "jais", "trillion"}, .splits = {}},
      {.names = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"},
       .splits = {},
       .digits = true},
      {.names = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"},
       .splits = {kLlama3Split},
       .ignore_merges = true,
       .add_bos = true},
      {.names = {"dbrx", "smaug-bpe"}, .splits = {kLlama3Split}},
      {.names = {"qwen2"}, .splits = {kQwen2Split}, .nfc = true},
      {.names = {"deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"}, .splits = {kQwen2Split}},
      {.names = {"tekken"}, .splits = {kTekkenSplit}, .ignore_merges = true, .add_bos = true},
      {.names = {"deepseek-v3", "hunyuan-dense"},
       .splits = {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+", kDeepseekV3Split}},
      {.names = {"deepseek-coder"},
       .splits = {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", "[一-龥ࠀ-一가-퟿]+", R"(\p{N})"}},
  };
  return kAll;
}

/// The file's pre-tokenizer. Old files name none: then the architecture's own.
const PreTokenizer& find_pre_tokenizer(const GgufFile& file) {
  std::string name = file.find_string(kPreKey).value_or("");
  if (name.empty())
    name = file.find_string("general.architecture").value_or("").starts_with("qwen") ? "qwen2" : "gpt-2";
  std::vector<const char*> known;
  for (const auto& pre : pre_tokenizers()) {
    for (const char* candidate : pre.names) {
      if (name == candidate) return pre;
      known.push_back(candidate);
    }
  }
  throw DataError(
      fmt::format("{}: {}: got '{}', expected one of {}. A folder with the model's own tokenizer.json can be "
                  "used instead.",
                  file.bytes().where, kPreKey, name.substr(0, 80), fmt::join(known, ", ")));
}

std::string utf8(uint32_t point) {  // below U+0800
  if (point < 0x80) return std::string(1, static_cast<char>(point));
  return {static_cast<char>(0xc0 | point >> 6), static_cast<char>(0x80 | (point & 0x3f))};
}

/// GPT-2's spelling of the 256 bytes: printable ones stand for themselves, the others for U+0100 and up.
const std::array<std::string, 256>& byte_spelling() {
  static const auto kSpelling = [] {
    std::array<std::string, 256> spelling;
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      spelling[byte] = utf8(printable ? byte : next++);
    }
    return spelling;
  }();
  return kSpelling;
}

std::string spell_bytes(std::string_view text) {
  std::string spelled;
  for (const unsigned char byte : text) spelled += byte_spelling()[byte];
  return spelled;
}

/// Length in bytes of the UTF-8 character that begins with `lead`.
size_t character_bytes(unsigned char lead) { return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4; }

/// True when every character is one of the spelled bytes.
bool is_spelled(std::string_view text) {
  static const auto kAlphabet = [] {
    std::set<std::string, std::less<>> alphabet(byte_spelling().begin(), byte_spelling().end());
    return alphabet;
  }();
  for (size_t i = 0; i < text.size();) {
    const size_t length = character_bytes(static_cast<unsigned char>(text[i]));
    if (!kAlphabet.contains(text.substr(i, length))) return false;
    i += length;
  }
  return true;
}

/// Tokens, types and special ids, checked against each other.
struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<double> types;                         // empty or one per token
  std::unordered_map<std::string_view, size_t> ids;  // the last id of a token that stands twice

  bool is(size_t id, double type) const { return !types.empty() && types[id] == type; }
};

Vocabulary read_vocabulary(const GgufFile& file) {
  Vocabulary vocabulary;
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  vocabulary.tokens.assign(tokens.begin(), tokens.end());
  vocabulary.types = file.numbers("tokenizer.ggml.token_type");
  MOESAIC_CHECK(vocabulary.types.empty() || vocabulary.types.size() == tokens.size(), FormatError,
                "{}: tokenizer.ggml.token_type has {} entries, expected {}", file.bytes().where,
                vocabulary.types.size(), tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    MOESAIC_CHECK(tokens[id].size() <= kMaxTokenBytes, FormatError, "{}: token {} has {} bytes, expected at most {}",
                  file.bytes().where, id, tokens[id].size(), kMaxTokenBytes);
  }
  return vocabulary;
}

void index_tokens(Vocabulary& vocabulary) {
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) vocabulary.ids[vocabulary.tokens[id]] = id;
}

/// The token of tokenizer.ggml.<name>_token_id; nullopt when the file names none.
std::optional<std::string> special_token(const GgufFile& file, const char* name) {
  const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
  const auto id = file.find_uint(key);
  if (!id) return std::nullopt;
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  MOESAIC_CHECK(*id < tokens.size(), FormatError, "{}: {}: got {}, but there are {} tokens", file.bytes().where, key,
                *id, tokens.size());
  return std::string(tokens[*id]);
}

struct AddedEnds {
  bool bos = false, eos = false;
};

AddedEnds added_ends(const GgufFile& file) {
  const std::string model = file.find_string("tokenizer.ggml.model").value_or("");
  bool bos = model == "llama";
  if (model == "gpt2" && !file.contains("tokenizer.ggml.add_bos_token")) bos = find_pre_tokenizer(file).add_bos;
  return {file.find_bool("tokenizer.ggml.add_bos_token").value_or(bos),
          file.find_bool("tokenizer.ggml.add_eos_token").value_or(false)};
}

std::vector<std::pair<std::string, std::string>> read_merges(const GgufFile& file, const Vocabulary& vocabulary) {
  std::vector<std::pair<std::string, std::string>> merges;
  for (const std::string_view merge : file.strings("tokenizer.ggml.merges")) {
    const size_t space = merge.find(' ');
    const bool two = space != std::string_view::npos && merge.find(' ', space + 1) == std::string_view::npos;
    MOESAIC_CHECK(two, FormatError, "{}: tokenizer.ggml.merges: got '{}', expected two tokens with a space between",
                  file.bytes().where, merge.substr(0, 80));
    const std::string left(merge.substr(0, space)), right(merge.substr(space + 1));
    for (const std::string& token : {left, right, left + right}) {
      MOESAIC_CHECK(vocabulary.ids.contains(token), FormatError,
                    "{}: tokenizer.ggml.merges: '{}' needs the token '{}', which the vocabulary lacks",
                    file.bytes().where, merge.substr(0, 80), token.substr(0, 80));
    }
    merges.emplace_back(left, right);
  }
  return merges;
}

/// SentencePiece stores no merges. Each way to cut a piece in two pieces is one; the best piece's come first, and of
/// one piece those with the longer left part (transformers: generate_merges).
std::vector<std::pair<std::string, std::string>> derive_merges(const Vocabulary& vocabulary,
                                                               const std::vector<double>& scores) {
  struct Merge {
    std::string_view left, right;
    double score;
    size_t left_length, right_length;  // characters
  };
  std::vector<Merge> merges, of_piece;
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string_view piece = vocabulary.tokens[id];
    if (vocabulary.ids.at(piece) != id) continue;
    size_t length = 0;
    for (size_t i = 0; i < piece.size(); i += character_bytes(static_cast<unsigned char>(piece[i]))) ++length;
    of_piece.clear();
    size_t left_length = 0;
    for (size_t i = 0; i < piece.size();) {
      i += character_bytes(static_cast<unsigned char>(piece[i]));
      ++left_length;
      const std::string_view left = piece.substr(0, i), right = piece.substr(i);
      if (right.empty() || !vocabulary.ids.contains(left) || !vocabulary.ids.contains(right)) continue;
      of_piece.push_back({left, right, scores[id], left_length, length - left_length});
    }
    std::stable_sort(of_piece.begin(), of_piece.end(), [&](const Merge& a, const Merge& b) {
      return std::pair(vocabulary.ids.at(a.left), vocabulary.ids.at(a.right)) <
             std::pair(vocabulary.ids.at(b.left), vocabulary.ids.at(b.right));
    });
    merges.insert(merges.end(), of_piece.begin(), of_piece.end());
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tie(a.score, a.left_length, a.right_length) > std::tie(b.score, b.left_length, b.right_length);
  });
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const Merge& merge : merges) pairs.emplace_back(merge.left, merge.right);
  return pairs;
}

Json split(const char* regex) {
  return {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
}

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json replace(std::string_view from, std::string_view to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

Json byte_level_pre_tokenizer(const PreTokenizer& pre) {
  if (pre.splits.empty() && !pre.digits) return byte_level(true);
  Json parts = Json::array();
  if (pre.digits) parts.push_back({{"type", "Digits"}, {"individual_digits", true}});
  for (const char* regex : pre.splits) parts.push_back(split(regex));
  parts.push_back(byte_level(pre.splits.empty()));
  return {{"type", "Sequence"}, {"pretokenizers", parts}};
}

/// BOS and EOS around the text, as the file asks; null when it asks for none.
Json post_processor(const GgufFile& file, const Vocabulary& vocabulary) {
  const AddedEnds added = added_ends(file);
  const auto bos = special_token(file, "bos"), eos = special_token(file, "eos");
  Json single = Json::array(), pair = Json::array(), tokens = Json::object();
  const auto add_special = [&](const std::string& token, int type_id, Json& to) {
    to.push_back({{"SpecialToken", {{"id", token}, {"type_id", type_id}}}});
    tokens[token] = {{"id", token}, {"ids", {vocabulary.ids.at(token)}}, {"tokens", {token}}};
  };
  const auto add_sequence = [&](const char* sequence, int type_id, Json& to) {
    if (added.bos && bos) add_special(*bos, type_id, to);
    to.push_back({{"Sequence", {{"id", sequence}, {"type_id", type_id}}}});
    if (added.eos && eos) add_special(*eos, type_id, to);
  };
  add_sequence("A", 0, single);
  if (tokens.empty()) return nullptr;
  add_sequence("A", 0, pair);
  add_sequence("B", 1, pair);
  return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", tokens}};
}

std::string json_string(std::string_view text) { return Json(text).dump(); }

/// The file's text. The vocabulary and merges are written directly: they are most of it.
std::string assemble(const Json& shell, const Vocabulary& vocabulary,
                     const std::vector<std::pair<std::string, std::string>>& merges) {
  Json outer = shell;
  const Json model = std::move(outer["model"]);
  outer.erase("model");
  std::string text = outer.dump();
  text.pop_back();
  text += ",\"model\":" + model.dump();
  text.pop_back();
  text += ",\"vocab\":{";
  bool first = true;
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.ids.at(vocabulary.tokens[id]) != id) continue;
    text += first ? "" : ",";
    text += json_string(vocabulary.tokens[id]) + ":" + std::to_string(id);
    first = false;
  }
  text += "},\"merges\":[";
  for (size_t i = 0; i < merges.size(); ++i) {
    text += i == 0 ? "[" : ",[";
    text += json_string(merges[i].first) + "," + json_string(merges[i].second) + "]";
  }
  return text + "]}}";
}

Json added_tokens(const GgufFile& file, const Vocabulary& vocabulary) {
  std::set<std::string> special;
  for (const char* name : {"bos", "eos", "padding"}) {
    if (const auto token = special_token(file, name)) special.insert(*token);
  }
  Json added = Json::array();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string& token = vocabulary.tokens[id];
    const bool is_special = vocabulary.is(id, kControl) || special.contains(token);
    if (token.empty() || vocabulary.ids.at(token) != id || !(is_special || vocabulary.is(id, kUserDefined))) continue;
    added.push_back({{"id", id},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", is_special}});
  }
  return added;
}

Json bpe_model(const Json& unk_token, bool fuse_unk, bool byte_fallback, bool ignore_merges) {
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", unk_token},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", fuse_unk},
          {"byte_fallback", byte_fallback},
          {"ignore_merges", ignore_merges}};
}

Json shell(const GgufFile& file, const Vocabulary& vocabulary) {
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added_tokens(file, vocabulary)},
          {"post_processor", post_processor(file, vocabulary)}};
}

std::string byte_level_json(const GgufFile& file) {
  const PreTokenizer& pre = find_pre_tokenizer(file);
  if (!file.contains(kPreKey)) {
    spdlog::warn("{}: {} is missing; '{}' is assumed. Convert the model again if its text looks wrong.",
                 file.bytes().where, kPreKey, pre.names[0]);
  }
  Vocabulary vocabulary = read_vocabulary(file);
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const bool added = vocabulary.is(id, kControl) || vocabulary.is(id, kUserDefined);
    if (!added && !is_spelled(vocabulary.tokens[id])) vocabulary.tokens[id] = spell_bytes(vocabulary.tokens[id]);
  }
  index_tokens(vocabulary);
  Json json = shell(file, vocabulary);
  json["normalizer"] = pre.nfc ? Json{{"type", "NFC"}} : Json();
  json["pre_tokenizer"] = byte_level_pre_tokenizer(pre);
  json["decoder"] = byte_level(true);
  json["model"] = bpe_model(nullptr, false, false, pre.ignore_merges);
  return assemble(json, vocabulary, read_merges(file, vocabulary));
}

std::string sentencepiece_json(const GgufFile& file) {
  const bool gemma = file.find_string("general.architecture").value_or("").starts_with("gemma");
  const bool prefix = !gemma && file.find_bool("tokenizer.ggml.add_space_prefix").value_or(true);
  Vocabulary vocabulary = read_vocabulary(file);
  if (gemma) {  // files spell runs of spaces with real ones
    for (auto& token : vocabulary.tokens) {
      if (token.empty() || token.find_first_not_of(' ') != std::string::npos) continue;
      std::string marks;
      for (size_t i = 0; i < token.size(); ++i) marks += kSpaceMark;
      token = marks;
    }
  }
  index_tokens(vocabulary);

  auto merges = read_merges(file, vocabulary);
  if (merges.empty()) {
    std::vector<double> scores(vocabulary.tokens.size());
    if (gemma) {  // its scores don't follow the merge order, the order in the file does
      for (size_t id = 0; id < scores.size(); ++id) scores[id] = -static_cast<double>(id);
    } else {
      scores = file.numbers("tokenizer.ggml.scores");
      const bool fine = scores.size() == vocabulary.tokens.size() &&
                        std::none_of(scores.begin(), scores.end(), [](double score) { return std::isnan(score); });
      MOESAIC_CHECK(fine, FormatError, "{}: tokenizer.ggml.scores: got {} scores, expected {} numbers",
                    file.bytes().where, scores.size(), vocabulary.tokens.size());
    }
    merges = derive_merges(vocabulary, scores);
  }

  Json json = shell(file, vocabulary);
  Json decoders = {replace(kSpaceMark, " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}};
  if (gemma) {
    json["normalizer"] = replace(" ", kSpaceMark);
    json["pre_tokenizer"] = {
        {"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "MergedWithPrevious"}, {"invert", false}};
  } else {
    json["normalizer"] = nullptr;
    json["pre_tokenizer"] = {{"type", "Metaspace"},
                             {"replacement", kSpaceMark},
                             {"prepend_scheme", prefix ? "first" : "never"},
                             {"split", false}};
  }
  if (prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  json["decoder"] = {{"type", "Sequence"}, {"decoders", decoders}};
  const auto unknown = special_token(file, "unknown");
  json["model"] = bpe_model(unknown ? Json(*unknown) : Json(), true, true, false);
  return assemble(json, vocabulary, merges);
}

}  // namespace

std::optional<std::string> gguf_tokenizer_json(const GgufFile& file) {
  if (!file.contains("tokenizer.ggml.tokens")) return std::nullopt;
  const std::string model = file.find_string("tokenizer.ggml.model").value_or("");
  if (model == "gpt2") return byte_level_json(file);
  if (model == "llama") return sentencepiece_json(file);
  throw DataError(fmt::format("{}: tokenizer.ggml.model: got '{}', expected gpt2 or llama", file.bytes().where,
                              model.substr(0, 80)));
}

Json gguf_tokenizer_config(const GgufFile& file) {
  Json config = Json::object();
  if (!file.contains("tokenizer.ggml.tokens")) return config;
  for (const auto& [key, name] :
       {std::pair{"bos_token", "bos"}, {"eos_token", "eos"}, {"unk_token", "unknown"}, {"pad_token", "padding"}}) {
    if (const auto token = special_token(file, name)) config[key] = *token;
  }
  const AddedEnds added = added_ends(file);
  config["add_bos_token"] = added.bos;
  config["add_eos_token"] = added.eos;
  config["clean_up_tokenization_spaces"] = false;
  config["tokenizer_class"] = "PreTrainedTokenizerFast";
  return config;
}

ChatTemplates gguf_chat_templates(const GgufFile& file) {
  constexpr const char* kKey = "tokenizer.chat_template";
  const std::string named = fmt::format("{}.", kKey);
  ChatTemplates templates;
  if (auto source = file.find_string(kKey)) templates["default"] = std::move(*source);
  for (const std::string& key : file.keys(named)) {
    if (auto source = file.find_string(key)) templates[key.substr(named.size())] = std::move(*source);
  }
  return templates;
}

}  // namespace moesaic::formats
