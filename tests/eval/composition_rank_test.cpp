#include <gtest/gtest.h>

#include "moesaic/eval/rank.h"
#include "tests/compose/small_models.h"

namespace moesaic::eval {
namespace {

TEST(RankComposed, EqualsOnePassOverPromptAndChoice) {
  const auto composition = test::two_tokenizers();
  const auto& tokenizer = *composition->anchor_member().tokenizer;
  std::vector<RankQuestion> questions;
  for (const auto& [prompt, choices] :
       {std::pair<std::string, std::vector<std::string>>("The keeper wrote", {" until dawn", " x", " 👍🏽 12"}),
        {"every name", {" into a book", " storms"}}}) {
    questions.push_back(make_rank_question(tokenizer, prompt, choices, false));
  }
  const auto scores = rank(*composition, questions);
  torch::NoGradGuard no_grad;
  for (size_t q = 0; q < questions.size(); ++q) {
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      std::vector<int64_t> ids = questions[q].prompt.ids;
      const int64_t shared = std::ssize(ids);
      ids.insert(ids.end(), questions[q].choices[c].begin(), questions[q].choices[c].end());
      const int64_t border = shared + questions[q].first_scored[c];
      const auto logprobs = at::log_softmax(test::logits_of(*composition, {ids}, {{border}}), 1);
      double expected = 0;
      for (int64_t t = border; t < std::ssize(ids); ++t) expected += logprobs[t - 1][ids[t]].item<double>();
      EXPECT_NEAR(scores[q][c].logprob, expected, 1e-4 * std::abs(expected)) << q << " " << c;
    }
  }
}

}  // namespace
}  // namespace moesaic::eval
