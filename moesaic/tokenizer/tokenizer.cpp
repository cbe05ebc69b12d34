// tokenizer.json through the Rust bridge, set up from tokenizer_config.json as transformers does it.
#include "moesaic/tokenizer/tokenizer.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "moesaic/base/file_errors.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/tokenizer/bridge_call.h"

namespace moesaic::tokenizer {
namespace {

constexpr const char* kSpecialTokenNames[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                              "pad_token", "cls_token", "mask_token"};
// U+FFFD: what the decoder puts where bytes are no character (yet).
constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";
// A character has at most 4 bytes, so a text that still ends in U+FFFD after this many ids is not waiting for more.
constexpr size_t kMaxPendingIds = 16;

/// A special token of tokenizer_config.json: a string or an object with its text under "content".
std::optional<std::string> token_text(const Json& token) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) {
    return token["content"].get<std::string>();
  }
  return std::nullopt;
}

/// The tokens of the configuration, in the order transformers adds them: added_tokens_decoder by id, then the named
/// ones.
Json configured_tokens(const Json& config, const std::map<std::string, std::string>& special_tokens,
                       const std::string& where) {
  Json tokens = Json::array();
  if (auto decoder = config.find("added_tokens_decoder"); decoder != config.end() && decoder->is_object()) {
    std::map<int64_t, Json> by_id;
    for (const auto& [key, token] : decoder->items()) {
      const bool is_id = !key.empty() && key.size() < 10 &&
                         std::all_of(key.begin(), key.end(), [](unsigned char c) { return c >= '0' && c <= '9'; });
      MOESAIC_CHECK(is_id && token_text(token), FormatError,
                    "{}: added_tokens_decoder['{}'] is {}, expected an id with {{\"content\": text, ...}}", where, key,
                    token.dump().substr(0, 80));
      Json entry = token.is_object() ? token : Json::object();
      entry["content"] = *token_text(token);
      by_id[std::stoll(key)] = std::move(entry);
    }
    for (auto& [id, token] : by_id) tokens.push_back(std::move(token));
  }
  for (const char* name : kSpecialTokenNames) {
    auto it = special_tokens.find(name);
    if (it != special_tokens.end()) tokens.push_back({{"content", it->second}, {"special", true}});
  }
  for (const char* name : {"additional_special_tokens", "extra_special_tokens"}) {
    if (!config.contains(name) || !config[name].is_array()) continue;
    for (const Json& token : config[name]) {
      if (const auto text = token_text(token)) tokens.push_back({{"content", *text}, {"special", true}});
    }
  }
  return tokens;
}

/// Removes from a normalizer or pre-tokenizer what puts a blank in front of a text. Returns true when it is to be
/// dropped as a whole. `words`: an earlier step has cut the text into words, each of which needs its mark.
bool drop_prefix(Json& step, bool& words) {
  if (!step.is_object()) return false;
  const std::string type = step.value("type", "");
  if (type == "Prepend") return true;
  if (type == "WhitespaceSplit" || type == "Whitespace") words = true;
  if (type == "ByteLevel") step["add_prefix_space"] = false;
  if (type == "Metaspace" && !words) {
    step["prepend_scheme"] = "never";
    step.erase("add_prefix_space");
  }
  for (const char* list : {"normalizers", "pretokenizers"}) {
    if (!step.contains(list) || !step[list].is_array()) continue;
    Json kept = Json::array();
    for (Json& part : step[list]) {
      if (!drop_prefix(part, words)) kept.push_back(part);
    }
    step[list] = kept;
  }
  return false;
}

}  // namespace

struct Tokenizer::Impl {
  std::unique_ptr<BridgeTokenizer, void (*)(BridgeTokenizer*)> bridge{nullptr, bridge_tokenizer_free};
  std::string json;
  Json config;
  std::map<std::string, std::string> special_tokens;  // "bos_token" -> "<s>"
  int64_t vocab_size = 0;
  std::vector<std::string> special_texts;
  bool adds_bos = false, prompts_apart = false;
  std::once_flag behind_once;
  std::unique_ptr<const Tokenizer> behind;  // for texts that go on; nullptr: this one does

  void encode(std::string_view text, bool add_special_tokens, bool with_offsets, OwnedEncoding& out) const {
    OwnedText error;
    MOESAIC_CHECK(bridge_tokenizer_encode(bridge.get(), text.data(), text.size(), add_special_tokens, with_offsets,
                                          out.out(), error.out()),
                  DataError, "cannot encode a text of {} bytes: {}", text.size(), error.reason());
  }

  std::optional<std::string> special_token(const char* name) const {
    auto it = special_tokens.find(name);
    return it == special_tokens.end() ? std::nullopt : std::optional(it->second);
  }
};

Tokenizer::Tokenizer(std::string_view tokenizer_json, const Json& config, const std::string& where, bool prompts_apart)
    : impl_(std::make_unique<Impl>()) {
  OwnedText error;
  impl_->prompts_apart = prompts_apart;
  impl_->json = tokenizer_json;
  impl_->config = config;
  impl_->bridge.reset(bridge_tokenizer_new(tokenizer_json.data(), tokenizer_json.size(), error.out()));
  if (!impl_->bridge) {
    const std::string reason = error.reason();
    const bool cut = reason.find("EOF while parsing") != std::string::npos;
    throw FormatError(
        fmt::format("{}: tokenizer.json is not usable: {}", where, cut ? ends_early(tokenizer_json.size()) : reason));
  }
  for (const char* name : kSpecialTokenNames) {
    auto it = config.find(name);
    if (it == config.end() || it->is_null()) continue;
    const auto text = token_text(*it);
    MOESAIC_CHECK(text, FormatError, "{}: tokenizer_config.json: {} is {}, expected a string or {{\"content\": text}}",
                  where, name, it->dump().substr(0, 80));
    impl_->special_tokens[name] = *text;
  }
  const std::string tokens = configured_tokens(config, impl_->special_tokens, where).dump();
  MOESAIC_CHECK(bridge_tokenizer_add_tokens(impl_->bridge.get(), tokens.data(), tokens.size(), error.out()),
                FormatError, "{}: cannot add the tokens of tokenizer_config.json: {}", where, error.reason());

  impl_->vocab_size = static_cast<int64_t>(bridge_tokenizer_vocab_size(impl_->bridge.get()));
  impl_->special_texts = Json::parse(OwnedText(bridge_tokenizer_special_tokens(impl_->bridge.get())).str())
                             .get<std::vector<std::string>>();
  const std::vector<int64_t> empty = encode("", true);
  impl_->adds_bos = !empty.empty() && bos_id() == empty.front();
}

Tokenizer::~Tokenizer() = default;

std::shared_ptr<Tokenizer> Tokenizer::open(const formats::Checkpoint& checkpoint) {
  const std::string where = checkpoint.path().string();
  const auto json = checkpoint.tokenizer_json();
  MOESAIC_CHECK(
      json, DataError,
      "{}: no tokenizer found, expected tokenizer.json beside the weights. Save it there with the tokenizer's "
      "save_pretrained.",
      where);
  return std::make_shared<Tokenizer>(*json, checkpoint.tokenizer_config(), where,
                                     checkpoint.config().value("is_encoder_decoder", Json()) == true);
}

std::shared_ptr<Tokenizer> Tokenizer::train(const std::vector<std::string>& texts, int64_t vocab_size) {
  MOESAIC_CHECK(vocab_size >= kSmallestTrained, UsageError,
                "a tokenizer of {} tokens: got fewer than its alphabet, expected at least {} (256 bytes, <bos>, <eos>, "
                "<pad>)",
                vocab_size, kSmallestTrained);
  std::vector<BridgeView> views;
  views.reserve(texts.size());
  for (const std::string& text : texts) views.push_back({text.data(), text.size()});
  OwnedText json, error;
  MOESAIC_CHECK(
      bridge_tokenizer_train(views.data(), views.size(), static_cast<size_t>(vocab_size), json.out(), error.out()),
      DataError, "cannot train a tokenizer on {} texts: {}", texts.size(), error.reason());
  const Json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
                    {"bos_token", "<bos>"},
                    {"eos_token", "<eos>"},
                    {"pad_token", "<pad>"}};
  return std::make_shared<Tokenizer>(json.str(), config, "trained tokenizer");
}

Encoding Tokenizer::encode_with_offsets(std::string_view text, bool add_special_tokens) const {
  OwnedEncoding raw;
  impl_->encode(text, add_special_tokens, /*with_offsets=*/true, raw);
  Encoding encoding;
  encoding.ids.assign(raw->ids, raw->ids + raw->size);
  encoding.offsets.reserve(raw->size);
  for (size_t i = 0; i < raw->size; ++i) encoding.offsets.emplace_back(raw->offsets[2 * i], raw->offsets[2 * i + 1]);
  return encoding;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  OwnedEncoding raw;
  impl_->encode(text, add_special_tokens, /*with_offsets=*/false, raw);
  return std::vector<int64_t>(raw->ids, raw->ids + raw->size);
}

Encoding Tokenizer::encode_start(std::string_view text) const {
  if (impl_->prompts_apart) {
    return encode_with_offsets(text, impl_->config.value("add_eos_token", Json()) != false);
  }
  Encoding encoding = encode_with_offsets(text, /*add_special_tokens=*/false);
  if (impl_->adds_bos && (encoding.ids.empty() || encoding.ids.front() != *bos_id())) {
    encoding.ids.insert(encoding.ids.begin(), *bos_id());
    encoding.offsets.insert(encoding.offsets.begin(), {0, 0});
  }
  return encoding;
}

std::vector<int64_t> Tokenizer::encode_behind(std::string_view text) const {
  if (impl_->prompts_apart) return encode(text, /*add_special_tokens=*/false);
  std::call_once(impl_->behind_once, [this] {
    const Json original = parse_json(impl_->json, "tokenizer.json");
    Json json = original;
    bool words = false;
    for (const char* part : {"normalizer", "pre_tokenizer"}) {
      if (json.contains(part) && drop_prefix(json[part], words)) json[part] = nullptr;
    }
    if (json != original) impl_->behind = std::make_unique<Tokenizer>(json.dump(), impl_->config, "tokenizer.json");
  });
  return (impl_->behind ? *impl_->behind : *this).encode(text, /*add_special_tokens=*/false);
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special_tokens) const {
  std::vector<uint32_t> narrow(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    MOESAIC_CHECK(ids[i] >= 0 && ids[i] <= UINT32_MAX, DataError, "cannot decode id {} at position {}: not a token id",
                  ids[i], i);
    narrow[i] = static_cast<uint32_t>(ids[i]);
  }
  OwnedText text, error;
  MOESAIC_CHECK(bridge_tokenizer_decode(impl_->bridge.get(), narrow.data(), narrow.size(), skip_special_tokens,
                                        text.out(), error.out()),
                DataError, "cannot decode {} ids: {}", ids.size(), error.reason());
  return text.str();
}

std::optional<int64_t> Tokenizer::token_to_id(std::string_view token) const {
  const int64_t id = bridge_tokenizer_token_to_id(impl_->bridge.get(), token.data(), token.size());
  return id < 0 ? std::nullopt : std::optional(id);
}

std::optional<std::string> Tokenizer::id_to_token(int64_t id) const {
  OwnedText token;
  if (id < 0 || id > UINT32_MAX) return std::nullopt;
  if (!bridge_tokenizer_id_to_token(impl_->bridge.get(), static_cast<uint32_t>(id), token.out())) return std::nullopt;
  return token.str();
}

bool Tokenizer::prompts_apart() const { return impl_->prompts_apart; }

const BridgeTokenizer* Tokenizer::bridge() const { return impl_->bridge.get(); }
int64_t Tokenizer::vocab_size() const { return impl_->vocab_size; }
std::optional<std::string> Tokenizer::bos_token() const { return impl_->special_token("bos_token"); }
std::optional<std::string> Tokenizer::eos_token() const { return impl_->special_token("eos_token"); }
const std::map<std::string, std::string>& Tokenizer::special_tokens() const { return impl_->special_tokens; }
const std::vector<std::string>& Tokenizer::special_texts() const { return impl_->special_texts; }
const std::string& Tokenizer::json() const { return impl_->json; }
const Json& Tokenizer::config() const { return impl_->config; }

std::optional<int64_t> Tokenizer::bos_id() const {
  const auto token = bos_token();
  return token ? token_to_id(*token) : std::nullopt;
}

std::optional<int64_t> Tokenizer::eos_id() const {
  const auto token = eos_token();
  return token ? token_to_id(*token) : std::nullopt;
}

StreamDecoder::StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(int64_t id) {
  ids_.push_back(id);
  return advance(/*last=*/false);
}

std::string StreamDecoder::finish() {
  std::string text = advance(/*last=*/true);
  ids_.clear();
  read_ = 0;
  return text;
}

std::string StreamDecoder::advance(bool last) {
  // The ids before read_ give the new ones their context: a decoder may strip the blank in front of the first token.
  const std::string known = tokenizer_->decode({ids_.begin(), ids_.begin() + read_}, skip_special_tokens_);
  std::string text = tokenizer_->decode(ids_, skip_special_tokens_);
  if (text.starts_with(known)) {
    text.erase(0, known.size());
  } else {
    text = tokenizer_->decode({ids_.begin() + read_, ids_.end()}, skip_special_tokens_);
  }
  const bool half_a_character = text.ends_with(kReplacementCharacter) && ids_.size() - read_ < kMaxPendingIds;
  if (text.empty() || (half_a_character && !last)) return "";
  ids_.erase(ids_.begin(), ids_.begin() + read_);
  read_ = ids_.size();
  return text;
}

std::vector<uint8_t> loss_mask(const Encoding& encoding, const RenderedChat& chat) {
  std::vector<uint8_t> mask(encoding.ids.size(), 0);
  for (size_t i = 0; i < mask.size(); ++i) {
    const auto [begin, end] = encoding.offsets[i];
    if (begin == end) continue;
    mask[i] = std::any_of(chat.trained.begin(), chat.trained.end(),
                          [end = end](const auto& range) { return range.first < end && end <= range.second; });
  }
  return mask;
}

}  // namespace moesaic::tokenizer
