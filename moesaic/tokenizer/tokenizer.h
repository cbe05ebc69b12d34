// Tokenizers (tokenizer.json through the `tokenizers` crate) and chat templates (minijinja), behind a C ABI.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::formats {
class Checkpoint;
}

struct BridgeTokenizer;

namespace moesaic::tokenizer {

/// Ids with the byte range of the text each came from (special tokens added by the tokenizer have an empty range).
/// A token that holds a part of a character has the whole character's range; blanks in front of a word are its own.
struct Encoding {
  std::vector<int64_t> ids;
  std::vector<std::pair<size_t, size_t>> offsets;  // bytes, [begin, end)
};

/// One tokenizer. Immutable and safe to share between threads.
class Tokenizer {
 public:
  /// `tokenizer_json`: the file's text. `config`: tokenizer_config.json, which names the special tokens. As in
  /// transformers 5, what is put around a text is the post-processor of tokenizer.json; `add_bos_token` is not read.
  /// prompts_apart: an encoder reads prompts, so that they are texts of their own; see encode_start.
  /// Throws FormatError.
  Tokenizer(std::string_view tokenizer_json, const Json& config, const std::string& where, bool prompts_apart = false);
  /// The tokenizer of a checkpoint. Throws DataError when it has none.
  static std::shared_ptr<Tokenizer> open(const formats::Checkpoint& checkpoint);
  /// A byte-level BPE of at most `vocab_size` tokens learnt from UTF-8 texts: <bos>, <eos> and <pad> (ids 0 to 2), the
  /// 256 bytes, then the merges of pairs that occur at least twice. Every digit stands alone; <bos> is put in front of
  /// a text. Follows from the texts alone, whatever their order.
  /// Throws UsageError for a vocab_size below kSmallestTrained, DataError for a text that is not UTF-8.
  static std::shared_ptr<Tokenizer> train(const std::vector<std::string>& texts, int64_t vocab_size);
  static constexpr int64_t kSmallestTrained = 259;
  ~Tokenizer();

  /// `add_special_tokens` applies the tokenizer's post-processor (BOS and the like), as transformers' __call__ does.
  std::vector<int64_t> encode(std::string_view text, bool add_special_tokens) const;
  Encoding encode_with_offsets(std::string_view text, bool add_special_tokens) const;
  /// The start of a text that will go on: BOS in front if the tokenizer adds one and the text does not spell it itself,
  /// and nothing behind. Prompts that stand apart get what the tokenizer puts around a text, as from transformers'
  /// __call__, unless tokenizer_config.json says `add_eos_token: false`: then nothing.
  Encoding encode_start(std::string_view text) const;
  /// `text` as it goes on behind another: without the blank that SentencePiece-style tokenizers put in front of a text.
  /// Behind a prompt that stands apart it is a text, with nothing around it.
  std::vector<int64_t> encode_behind(std::string_view text) const;
  std::string decode(const std::vector<int64_t>& ids, bool skip_special_tokens) const;

  /// Whether prompts are texts of their own, which an encoder reads.
  bool prompts_apart() const;

  std::optional<int64_t> token_to_id(std::string_view token) const;
  std::optional<std::string> id_to_token(int64_t id) const;
  int64_t vocab_size() const;
  std::optional<int64_t> bos_id() const;
  std::optional<int64_t> eos_id() const;
  std::optional<std::string> bos_token() const;
  std::optional<std::string> eos_token() const;
  /// The special tokens that tokenizer_config.json names: "bos_token" -> "<s>", ...
  const std::map<std::string, std::string>& special_tokens() const;
  /// The texts of all tokens that are marked special, by id.
  const std::vector<std::string>& special_texts() const;
  /// The text of tokenizer.json, for writing beside an adapter.
  const std::string& json() const;
  /// tokenizer_config.json.
  const Json& config() const;
  /// The Rust side of it, for others in this folder.
  const BridgeTokenizer* bridge() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Turns a growing list of ids into text that never holds half a character: for streaming.
/// The pieces put together are the decoded text of all ids, wherever those ids hold whole characters.
class StreamDecoder {
 public:
  explicit StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens = true);
  /// The text that became certain with this id (may be empty).
  std::string push(int64_t id);
  /// What is left at the end.
  std::string finish();

 private:
  std::string advance(bool last);

  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_tokens_;
  std::vector<int64_t>
      ids_;          // the window that is decoded again: context, then ids that wait for the rest of a character
  size_t read_ = 0;  // ids of the window whose text was already returned
};

/// A rendered conversation and the byte ranges a model is trained to produce. The template writes BOS itself, so the
/// text is encoded without special tokens.
struct RenderedChat {
  std::string text;
  std::vector<std::pair<size_t, size_t>> trained;  // bytes: the assistant's words with their end-of-turn token
};

/// The chat templates of a model, by name, with the functions transformers gives them (raise_exception, strftime_now,
/// tojson, {% generation %}). As in transformers, a conversation with tools is rendered by the one named `tool_use`
/// where there is one, every other by `default`. The one renderer of training, evaluation, generation and serving.
class ChatTemplate {
 public:
  /// Throws FormatError with the template's line when the default one does not compile.
  ChatTemplate(std::map<std::string, std::string> sources, const Tokenizer& tokenizer);
  /// One template for everything.
  ChatTemplate(std::string source, const Tokenizer& tokenizer);
  /// The templates of a checkpoint; nullptr when it has none.
  static std::shared_ptr<ChatTemplate> open(const formats::Checkpoint& checkpoint, const Tokenizer& tokenizer);
  ~ChatTemplate();

  /// messages: [{role, content, ...}]; tools: a list or null; extra: further template variables (object).
  /// As in transformers, null values of a message are dropped and its reasoning is found under all its names. Beyond
  /// it, tools and calls without {"type": "function", "function": ...} around them get it, and the arguments of a call
  /// that are JSON text are given as the object they mean; as text, where the template refuses the object. Throws
  /// DataError with the template's own words when it raises.
  std::string render(const OrderedJson& messages, bool add_generation_prompt, const OrderedJson& tools = nullptr,
                     const OrderedJson& extra = OrderedJson::object()) const;

  /// Renders a whole conversation and finds what a model learns of it: the template's {% generation %} blocks, or each
  /// turn of the assistant from the end of the generation prompt to the end-of-turn token. A message with
  /// `"train": false` or `"weight": 0` is left out of `trained`.
  /// Throws DataError when the template does not show a trained message.
  RenderedChat render_for_training(const OrderedJson& messages, const OrderedJson& tools = nullptr) const;

  /// The special token the template writes behind an answer; nullopt when it writes none.
  std::optional<std::string> end_of_turn() const;

  /// By name.
  const std::map<std::string, std::string>& sources() const;
  /// The one for conversations without tools.
  const std::string& source() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// 1 for every token whose bytes lie in a trained range, else 0. A token that straddles a border is trained when its
/// last byte lies inside.
std::vector<uint8_t> loss_mask(const Encoding& encoding, const RenderedChat& chat);

}  // namespace moesaic::tokenizer
