#include "moesaic/tokenizer/grammar.h"

#include <limits>

#include "moesaic/base/bridge_text.h"
#include "moesaic/base/check.h"

namespace moesaic::tokenizer {

std::unique_ptr<Grammar> Grammar::fork() const {
  OwnedText reason;
  std::shared_ptr<BridgeMatcher> copy(bridge_matcher_fork(matcher_.get(), reason.out()), bridge_matcher_free);
  MOESAIC_CHECK(copy != nullptr, DataError, "grammar: {}", reason.reason());
  return std::make_unique<Grammar>(std::move(copy));
}

void Grammar::mask(std::span<float> logits) {
  constexpr size_t kBits = 32;
  std::vector<uint32_t> bits((logits.size() + kBits - 1) / kBits);
  OwnedText reason;
  MOESAIC_CHECK(bridge_matcher_mask(matcher_.get(), bits.data(), bits.size(), reason.out()), DataError,
                "grammar: can't be followed further: {}", reason.reason());
  for (size_t t = 0; t < logits.size(); ++t) {
    if ((bits[t / kBits] >> (t % kBits) & 1) == 0) logits[t] = -std::numeric_limits<float>::infinity();
  }
}

void Grammar::take(int64_t token) {
  OwnedText reason;
  MOESAIC_CHECK(bridge_matcher_take(matcher_.get(), static_cast<uint32_t>(token), reason.out()), DataError,
                "grammar: token {} can't come next: {}", token, reason.reason());
}

bool Grammar::ended() const { return bridge_matcher_ended(matcher_.get()); }

Grammars::Grammars(std::shared_ptr<const Tokenizer> tokenizer, std::vector<int64_t> eos_ids, int64_t vocab_size)
    : tokenizer_(std::move(tokenizer)), eos_ids_(std::move(eos_ids)), vocab_size_(vocab_size) {}

std::shared_ptr<const Grammar> Grammars::compile(const std::string& kind, const std::string& source) const {
  std::call_once(indexed_, [this] {
    const std::vector<uint32_t> eos(eos_ids_.begin(), eos_ids_.end());
    OwnedText reason;
    index_.reset(bridge_grammars_new(tokenizer_->bridge(), eos.data(), eos.size(), vocab_size_, reason.out()),
                 bridge_grammars_free);
    MOESAIC_CHECK(index_ != nullptr, DataError, "answers can't be held to a grammar here: {}", reason.reason());
  });
  OwnedText reason;
  std::shared_ptr<BridgeMatcher> matcher(
      bridge_matcher_new(index_.get(), kind.data(), kind.size(), source.data(), source.size(), reason.out()),
      bridge_matcher_free);
  MOESAIC_CHECK(matcher != nullptr, UsageError, "{}: {}", kind, reason.reason());
  return std::make_shared<const Grammar>(std::move(matcher));
}

}  // namespace moesaic::tokenizer
