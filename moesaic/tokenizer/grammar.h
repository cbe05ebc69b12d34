// What an answer may hold: a JSON schema, a regular expression or a Lark grammar, token by token.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "moesaic/tokenizer/tokenizer.h"

struct BridgeGrammars;
struct BridgeMatcher;

namespace moesaic::tokenizer {

/// Where one text stands in its grammar. For one thread at a time.
class Grammar {
 public:
  explicit Grammar(std::shared_ptr<BridgeMatcher> matcher) : matcher_(std::move(matcher)) {}
  /// The same place, for another text.
  std::unique_ptr<Grammar> fork() const;
  /// logits [V]: -infinity for every token that can't come next; an end of the answer may come where the text may end.
  /// Throws DataError where the grammar has become too large to follow.
  void mask(std::span<float> logits);
  /// The text goes on with a token that the mask let through.
  void take(int64_t token);
  /// Whether the text can't go on.
  bool ended() const;

 private:
  std::shared_ptr<BridgeMatcher> matcher_;
};

/// The grammars of a tokenizer. Its vocabulary is indexed when the first one is compiled. Safe to share.
class Grammars {
 public:
  /// eos_ids: what ends an answer; vocab_size: of the model's logits.
  Grammars(std::shared_ptr<const Tokenizer> tokenizer, std::vector<int64_t> eos_ids, int64_t vocab_size);
  /// kind: `json_schema`, whose texts have one blank behind "," and ":" and none elsewhere (its key `x-guidance` says
  /// otherwise); `regex`, of the whole text; `lark`, in llguidance's form. Throws UsageError with the reason for a
  /// source that is too large (64 KiB, 32 levels), wrong, or has keywords that can't be held to; DataError where it is
  /// not known what the tokenizer's tokens write.
  std::shared_ptr<const Grammar> compile(const std::string& kind, const std::string& source) const;

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<int64_t> eos_ids_;
  int64_t vocab_size_;
  mutable std::once_flag indexed_;
  mutable std::shared_ptr<BridgeGrammars> index_;
};

}  // namespace moesaic::tokenizer
