#include "moesaic/compose/alignment.h"

#include "moesaic/base/check.h"

namespace moesaic::compose {
namespace {

constexpr size_t kLongestChunk = 32, kLongestAcrossLines = 256;  // characters

/// Unicode's White_Space property.
bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/// The character at text[at] and its bytes. A byte that begins no character counts as one.
std::pair<char32_t, size_t> character_at(std::string_view text, size_t at) {
  const auto first = static_cast<unsigned char>(text[at]);
  const size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC0 ? 2 : 1;
  if (length == 1 || at + length > text.size()) return {first < 0x80 ? first : 0xFFFD, 1};
  char32_t c = first & (0xFF >> (length + 1));
  for (size_t i = 1; i < length; ++i) c = c << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3F);
  return {c, length};
}

}  // namespace

bool same_tokenizer(const tokenizer::Tokenizer& a, const tokenizer::Tokenizer& b) {
  if (a.json() == b.json()) return true;
  const Json x = parse_json(a.json(), "tokenizer.json"), y = parse_json(b.json(), "tokenizer.json");
  for (const char* part : {"model", "normalizer", "pre_tokenizer", "added_tokens"}) {
    if (x.value(part, Json()) != y.value(part, Json())) return false;
  }
  return true;
}

size_t closed_chunk(std::string_view text, bool across_lines) {
  bool word = false;
  size_t at = 0;
  for (size_t characters = 1; at < text.size(); ++characters) {
    const auto [c, bytes] = character_at(text, at);
    const bool blank = is_white_space(c);
    if (blank && word && !(across_lines && (c == U'\n' || c == U'\r'))) return at;
    word = across_lines && (c == U'\n' || c == U'\r') ? false : word || !blank;
    at += bytes;
    if (characters == (across_lines ? kLongestAcrossLines : kLongestChunk)) return at;
  }
  return 0;
}

Alignment::Alignment(std::shared_ptr<const tokenizer::Tokenizer> anchor,
                     std::shared_ptr<const tokenizer::Tokenizer> augmenting, const std::string& rule,
                     const std::string& policy, bool ahead)
    : prompt_by_word_(rule != "token"),
      answer_by_word_(rule == "word" || rule == "text"),
      tails_(rule == "text"),
      ahead_(ahead),
      policy_(policy) {
  MOESAIC_CHECK(rule == "word" || rule == "token" || rule == "mixed" || rule == "text", ConfigError,
                "align: got '{}', expected word, token, mixed or text", rule);
  MOESAIC_CHECK(policy == "causal" || policy == "prefix" || policy == "full", ConfigError,
                "mask: got '{}', expected causal, prefix or full", policy);
  MOESAIC_CHECK(!ahead || policy == "prefix", ConfigError, "mask: got '{}', expected prefix for an encoder", policy);
  MOESAIC_CHECK((anchor == nullptr) == (augmenting == nullptr), ConfigError,
                "one of two composed models has no tokenizer; expected both or none");
  if (anchor == nullptr || same_tokenizer(*anchor, *augmenting)) return;
  anchor_ = std::move(anchor);
  augmenting_ = std::move(augmenting);
  const auto start = augmenting_->bos_id() ? augmenting_->bos_id() : augmenting_->eos_id();
  if (start && !ahead) start_ = {*start};
  for (const std::string& text : anchor_->special_texts()) {
    const auto id = anchor_->token_to_id(text);
    if (!id) continue;
    is_special_.resize(std::max<size_t>(is_special_.size(), *id + 1), 0);
    is_special_[*id] = 1;
  }
}

Aligner::Aligner(std::shared_ptr<const Alignment> alignment) : alignment_(std::move(alignment)) {
  if (!alignment_->passes_ids()) decoder_.emplace(alignment_->anchor_);
}

/// `text` behind what was read before.
std::vector<int64_t> Aligner::encode(std::string_view text) const {
  const auto& tokenizer = *alignment_->augmenting_;
  return at_start_ ? tokenizer.encode(text, /*add_special_tokens=*/false) : tokenizer.encode_behind(text);
}

/// Commits the first `bytes` of the open text.
void Aligner::close(size_t bytes, std::vector<int64_t>& ids) {
  for (const int64_t id : encode(std::string_view(open_).substr(0, bytes))) ids.push_back(id);
  open_.erase(0, bytes);
  at_start_ = false;
}

/// Reads all of the open text; whole: as the prompt's end, with what a tokenizer puts around a text.
void Aligner::close_prompt(bool whole, std::vector<int64_t>& ids) {
  const auto& tokenizer = *alignment_->augmenting_;
  const auto encoding =
      whole ? tokenizer.encode_start(open_) : tokenizer.encode_with_offsets(open_, /*add_special_tokens=*/false);
  for (size_t i = 0; i < encoding.ids.size(); ++i) {
    const auto [begin, end] = encoding.offsets[i];
    const auto token = std::lower_bound(ends_.begin(), ends_.end(), std::pair<size_t, int64_t>(end, 0));
    ids.push_back(encoding.ids[i]);
    places_.push_back(begin == end || token == ends_.end() ? tokens() : token->second);
  }
  open_.clear();
  ends_.clear();
}

std::vector<int64_t> Aligner::read(int64_t id, bool border) {
  if (frozen_) return {};
  frozen_ = border && alignment_->policy_ == "prefix";
  if (alignment_->passes_ids()) return {id};
  std::vector<int64_t> ids;
  if (history_.size() == 1) ids = alignment_->start_;
  open_ += decoder_->push(id);
  const bool special =
      id >= 0 && id < std::ssize(alignment_->is_special_) && alignment_->is_special_[static_cast<size_t>(id)];
  if (alignment_->ahead_) {
    ends_.emplace_back(open_.size(), tokens());
    if (border || (special && !open_.empty())) close_prompt(border, ids);
    return ids;
  }
  const bool by_word = answering_ ? alignment_->answer_by_word_ : alignment_->prompt_by_word_;
  answering_ = answering_ || border;
  if (by_word) {
    while (const size_t bytes = closed_chunk(open_, alignment_->tails_)) close(bytes, ids);
  }
  if (!open_.empty() && (border || special || !by_word)) close(open_.size(), ids);
  if (alignment_->tails_) tail_ = open_.empty() ? std::vector<int64_t>() : encode(open_);
  return ids;
}

std::vector<int64_t> Aligner::push(int64_t id, bool border) {
  history_.emplace_back(id, border);
  const std::vector<int64_t> before = tail_;
  std::vector<int64_t> ids = read(id, border), now = ids;
  now.insert(now.end(), tail_.begin(), tail_.end());
  standing_ =
      committed() + (std::mismatch(before.begin(), before.end(), now.begin(), now.end()).first - before.begin());
  places_.resize(std::max<size_t>(standing_, places_.size() - before.size()));
  places_.resize(static_cast<size_t>(committed()) + held_.size() + now.size(), tokens());
  if (alignment_->ahead_) {
    held_.insert(held_.end(), ids.begin(), ids.end());
    ids = border ? std::exchange(held_, {}) : std::vector<int64_t>();
  }
  counts_.push_back(committed() + std::ssize(ids));
  return ids;
}

void Aligner::truncate(int64_t tokens) {
  MOESAIC_CHECK(tokens >= 0 && tokens <= this->tokens(), ShapeError, "aligner: cannot cut {} tokens to {}",
                this->tokens(), tokens);
  if (tokens == this->tokens()) return;
  const std::vector<std::pair<int64_t, bool>> kept(history_.begin(), history_.begin() + tokens);
  *this = Aligner(alignment_);
  for (const auto& [id, border] : kept) push(id, border);
}

}  // namespace moesaic::compose
