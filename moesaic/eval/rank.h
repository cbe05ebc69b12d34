// Rank classification: the log-likelihood of each answer choice behind its prompt, the prompt computed once.
#pragma once
#include <string>
#include <vector>

#include "moesaic/generate/generate.h"

namespace moesaic::eval {

/// A prompt and its choices as tokens.
struct RankQuestion {
  generate::Prompt prompt;                    // what all choices share, at least one token
  std::vector<std::vector<int64_t>> choices;  // the tokens behind it, at least one each
  std::vector<int64_t> first_scored;          // per choice: tokens before this one are not scored
  std::vector<int64_t> first_of_choice;       // per choice: tokens before this one hold none of the choice's text
};

/// Tokenises prompt + choice jointly, as the text would be read, and scores every token that holds a byte of the
/// choice: where a tokenizer merges across the border, that token is the choice's. As in lm-evaluation-harness, blanks
/// at the end of the prompt are scored with every choice. The common beginning becomes the shared prompt. eos >= 0 is
/// appended to every choice and scored. A prompt without tokens gets the BOS (else EOS) token, as
/// lm-evaluation-harness does. Throws DataError when there is neither. A prompt that stands apart (an encoder's) and
/// the choices are tokenised one by one.
RankQuestion make_rank_question(const tokenizer::Tokenizer& tokenizer, const std::string& prompt,
                                const std::vector<std::string>& choices, bool add_special_tokens, int64_t eos = -1);

struct ChoiceScore {
  double logprob = 0;      // sum over the scored tokens of log p(token | all before it), float32 each
  bool is_greedy = false;  // every scored token was the most probable one
};

/// One list of scores per question. The questions form one ragged batch: prompts in one pass, the rest of all choices,
/// each behind its own copy of what is remembered of the prompt, in a second one. The beginning of a choice's text is a
/// border.
std::vector<std::vector<ChoiceScore>> rank(models::LanguageModel& model, const std::vector<RankQuestion>& questions,
                                           const generate::RoutingCallback& routing = nullptr);

/// The first of the largest values, and whether it was not alone.
struct Winner {
  size_t index = 0;
  bool tied = false;
};
Winner first_largest(const std::vector<double>& values);

}  // namespace moesaic::eval
