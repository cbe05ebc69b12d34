// How an augmenting model reads the text that the anchor reads: which of its tokens exist, and from where on the anchor
// may see them.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::compose {

/// True when both turn every text into the same ids: equal model, normalizer, pre-tokenizer and added tokens.
bool same_tokenizer(const tokenizer::Tokenizer& a, const tokenizer::Tokenizer& b);

/// One augmenting model's reading, shared by all sequences. Immutable.
///
/// The anchor's tokens are turned back into text, character by complete character; special tokens have none. The
/// augmenting model's tokens of a stretch of text are *committed* when that stretch can no longer change:
///
///   word   a chunk is a run of white space with the run of other characters behind it; it closes at the next white
///          space, at a border (a special token, the end of a prompt) or after 32 characters
///   token  the characters that an anchor token completes
///   mixed  word up to the first border, token behind it: a prompt is read as the augmenting model knows it, and an
///          answer without the delay of a word
///   text   as word, but that no chunk ends at the end of a line (some tokenizers put it to what stands before it) and
///          that one may have 256 characters; and beside what is committed the *tail*: what the open chunk is as far as
///          it is known, which the next characters may spell anew. So every position sees the text so far as the
///          augmenting model knows it
///
/// An encoder reads ahead: its states of every token depend on all of them. So it is given the text up to the first
/// border and nothing behind it, and all of that is committed at once, when the border is reached: the token before an
/// answer is the first to see any of it, and an answer's tokens never enter. Nothing is left to wait for then, so that
/// the rule is of no account: what lies between special tokens is tokenised in one piece, and the last as its
/// tokenizer does a text (T5's: with EOS behind).
///
/// Each stretch is tokenised by itself. So what is committed after a prefix of the text depends on that prefix alone
/// and only grows: the anchor position that ends the prefix may see it without knowing anything of what follows.
/// With equal tokenizers the ids pass through.
class Alignment {
 public:
  /// rule: word | token | mixed | text. policy: causal (as above) | prefix (nothing behind the first border is read) |
  /// full (every position sees all, also the future: for comparison with other code only). Throws ConfigError for
  /// another word, and for another policy than prefix where the augmenting model reads `ahead`. Without tokenizers
  /// (both nullptr) the ids pass through.
  Alignment(std::shared_ptr<const tokenizer::Tokenizer> anchor, std::shared_ptr<const tokenizer::Tokenizer> augmenting,
            const std::string& rule, const std::string& policy, bool ahead = false);

  bool passes_ids() const { return augmenting_ == nullptr; }
  const std::string& policy() const { return policy_; }

 private:
  friend class Aligner;
  std::shared_ptr<const tokenizer::Tokenizer> anchor_, augmenting_;
  std::vector<int64_t> start_;       // BOS, or EOS where there is none, in front of the text
  std::vector<uint8_t> is_special_;  // by anchor id
  bool prompt_by_word_, answer_by_word_, tails_, ahead_;
  std::string policy_;
};

/// The growing reading of one sequence.
class Aligner {
 public:
  explicit Aligner(std::shared_ptr<const Alignment> alignment);

  /// Appends an anchor token; `border`: the text is known to end behind it (the end of a prompt). Returns the
  /// augmenting model's ids that this commits; the position of this token and those after it see them.
  std::vector<int64_t> push(int64_t id, bool border);
  /// Anchor tokens so far.
  int64_t tokens() const { return static_cast<int64_t>(counts_.size()); }
  /// Augmenting ids committed so far: c(t) of the last token.
  int64_t committed() const { return counts_.empty() ? 0 : counts_.back(); }
  /// With rule `text` the ids of the open chunk, behind those committed.
  const std::vector<int64_t>& tail() const { return tail_; }
  /// Of the ids read before the last push, committed and tail, how many still stand.
  int64_t standing() const { return standing_; }
  /// Of every augmenting id read so far, committed, tail or held: the anchor's token from which on it stands.
  const std::vector<int64_t>& places() const { return places_; }
  /// Forgets all but the first `tokens` anchor tokens.
  void truncate(int64_t tokens);

 private:
  std::vector<int64_t> read(int64_t id, bool border);
  std::vector<int64_t> encode(std::string_view text) const;
  void close(size_t bytes, std::vector<int64_t>& ids);
  void close_prompt(bool whole, std::vector<int64_t>& ids);

  std::shared_ptr<const Alignment> alignment_;
  std::vector<std::pair<int64_t, bool>> history_;  // what was pushed
  std::vector<int64_t> counts_;                    // committed after each token
  std::vector<int64_t> places_;                    // see places()
  std::vector<int64_t> held_;                      // read ahead, but not committed
  std::vector<int64_t> tail_;                      // see tail()
  int64_t standing_ = 0;
  std::optional<tokenizer::StreamDecoder> decoder_;
  std::string open_;                              // characters that are not committed yet
  std::vector<std::pair<size_t, int64_t>> ends_;  // reading ahead: bytes of open_ behind each of its tokens
  bool at_start_ = true, frozen_ = false;
  bool answering_ = false;  // behind the first border
};

/// Bytes of the first chunk of `text` when it is closed, else 0 (see Alignment: rule `word`, or `text`). UTF-8.
size_t closed_chunk(std::string_view text, bool across_lines = false);

}  // namespace moesaic::compose
