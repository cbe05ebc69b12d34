// Key-value arithmetic: two keys stand for two-digit numbers; one model knows the keys, another can add and subtract.
// The task of the first experiment of arXiv 2401.02412, small enough for models made in minutes.
#pragma once
#include <string>
#include <vector>

#include "moesaic/data/example.h"

namespace moesaic::demos {

/// The texts, token by token (every key is one token, every digit one; values have two digits, tens first; answers
/// three, units first; no answer is negative):
///
///   substitution   <bos> K1 op K2 > t u op t u <eos>                            learnt behind '>'
///   arithmetic     <bos> [K op K, half of the time] > t u op t u = u t h <eos>   learnt from '=' on
///   composed       <bos> K1 op K2 > t u op t u = u t h <eos>                    learnt behind '>'
///   otherwise      a substitution in which every key is worth what the key before it is
///
/// The keys of arithmetic mean nothing and its expressions are not learnt: they would be noise. Its '=' is: a head that
/// was never asked for a token can hardly be brought to write it. What the keys are worth, which of them are held in,
/// and which tenth of all expressions of numbers is never trained are the same for all seeds.
enum class KeyText { kSubstitution, kArithmetic, kComposed, kOtherwise };

/// What a model is asked.
enum class KeyTask { kSubstitute, kCalculate, kBoth };  // KV-SUB, NUM-MATH, KV-MATH

struct KeyQuestion {
  std::vector<int64_t> prompt;
  std::vector<int64_t> wanted;  // the substituted expression, or the digits of the answer
};

/// What each key is worth: a permutation of 0 .. keys-1, modulo `values`.
std::vector<int64_t> draw_key_values(int64_t keys, int64_t values, uint64_t seed);
/// Pronounceable strings of 2 to 6 letters, all different.
std::vector<std::string> draw_key_names(int64_t keys, uint64_t seed);

/// tokenizer.json and tokenizer_config.json of the 520 tokens, which stand apart by blanks in a text.
Json key_tokenizer_json();
Json key_tokenizer_config();
inline constexpr int64_t kKeyVocabulary = 520;
int64_t key_bos_id();
int64_t key_eos_id();

/// `count` questions with keys never held in, on expressions never trained (KV-SUB: on any).
std::vector<KeyQuestion> key_questions(KeyTask task, int64_t count, uint64_t seed);
/// True when `answer` (generated ids) is right: KV-SUB, the expression before '=' or the end; else the digits behind
/// the last '='.
bool key_answer_is_right(KeyTask task, const KeyQuestion& question, const std::vector<int64_t>& answer);

/// An endless stream of training texts, each of the kinds of `mix` in turn. Substitutions take all keys, composed texts
/// only those held in.
class KeyTexts : public data::ExampleStream {
 public:
  KeyTexts(std::vector<KeyText> mix, uint64_t seed) : mix_(std::move(mix)), seed_(seed) {}
  std::optional<data::Example> next() override;
  Json state() const override { return {{"position", position_}}; }
  void set_state(const Json& state) override { position_ = state.at("position").get<int64_t>(); }

 private:
  std::vector<KeyText> mix_;
  uint64_t seed_;
  int64_t position_ = 0;
};

}  // namespace moesaic::demos
