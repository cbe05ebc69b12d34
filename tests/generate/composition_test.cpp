#include <gtest/gtest.h>

#include "moesaic/generate/generate.h"
#include "tests/compose/small_models.h"

namespace moesaic::generate {
namespace {

using Ids = std::vector<int64_t>;

std::vector<Prompt> prompts(const compose::Composition& composition) {
  std::vector<Prompt> ids;
  for (const char* text : {"The keeper wrote un", "x", "คนเฝ้า 👍🏽", "every name into"}) {
    ids.push_back({composition.anchor_member().tokenizer->encode(text, false)});
  }
  return ids;
}

/// Greedy decoding by full passes without a cache over prompt and answer.
Ids by_full_passes(compose::Composition& composition, const Ids& prompt, int64_t tokens) {
  Ids ids = prompt;
  for (int64_t i = 0; i < tokens; ++i) {
    const auto logits = test::logits_of(composition, {ids}, {{std::ssize(prompt)}});
    ids.push_back(logits[-1].argmax().item<int64_t>());
  }
  return {ids.begin() + std::ssize(prompt), ids.end()};
}

TEST(GenerateComposed, GreedyEqualsFullPassesInARaggedBatch) {
  for (const char* rule : {"word", "token"}) {
    for (const char* mask : {"causal", "prefix"}) {
      const auto composition = test::two_tokenizers({{{0, 1}, {2, 2}}, rule, mask});
      const auto ids = prompts(*composition);
      const auto& tokenizer = *composition->anchor_member().tokenizer;
      const auto answers = generate(*composition, tokenizer, ids, {.max_new_tokens = 14});
      for (size_t i = 0; i < ids.size(); ++i) {
        EXPECT_EQ(answers[i].ids, by_full_passes(*composition, ids[i].ids, 14)) << rule << mask << i;
      }
    }
  }
}

TEST(GenerateComposed, AnswersEndOneByOne) {
  const auto composition = test::two_tokenizers();
  const auto ids = prompts(*composition);
  const auto& tokenizer = *composition->anchor_member().tokenizer;
  const auto plain = generate(*composition, tokenizer, ids, {.max_new_tokens = 10});
  const int64_t eos = plain[2].ids[3];
  const auto answers = generate(*composition, tokenizer, ids, {.max_new_tokens = 10, .eos_ids = {eos}});
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto end = std::find(plain[i].ids.begin(), plain[i].ids.end(), eos);
    EXPECT_EQ(answers[i].ids, Ids(plain[i].ids.begin(), end == plain[i].ids.end() ? end : end + 1)) << i;
  }
}

TEST(GenerateComposed, SessionEqualsAFreshStartWhereNothingIsShared) {
  const auto composition = test::two_tokenizers();
  const auto& tokenizer = *composition->anchor_member().tokenizer;
  const SamplingOptions options{.max_new_tokens = 6};
  Session session(*composition, tokenizer);
  const Ids first = tokenizer.encode("The keeper wrote until", false);
  EXPECT_EQ(session.answer({first}, options).ids, by_full_passes(*composition, first, 6));
  const Ids second = tokenizer.encode("every name", false);
  EXPECT_EQ(session.answer({second}, options).ids, by_full_passes(*composition, second, 6));
  EXPECT_EQ(session.answer({second}, options).ids, by_full_passes(*composition, second, 6));
  EXPECT_EQ(session.reused(), std::ssize(second) - 1);
}

/// The next turn keeps what was read; the earlier prompt's end stays a border.
TEST(GenerateComposed, SessionGoesOnFromWhatItRead) {
  const auto composition = test::two_tokenizers();
  const auto& tokenizer = *composition->anchor_member().tokenizer;
  const SamplingOptions options{.max_new_tokens = 6};
  Session session(*composition, tokenizer);
  const Ids first = tokenizer.encode("The keeper wrote until", false);
  Ids second = first;
  for (const int64_t id : session.answer({first}, options).ids) second.push_back(id);
  for (const int64_t id : tokenizer.encode(" every name", false)) second.push_back(id);
  const Ids answer = session.answer({second}, options).ids;
  EXPECT_EQ(session.reused(), std::ssize(first) + 5);
  Ids ids = second;
  for (int64_t i = 0; i < 6; ++i) {
    const auto logits = test::logits_of(*composition, {ids}, {{std::ssize(first), std::ssize(second)}});
    ids.push_back(logits[-1].argmax().item<int64_t>());
  }
  EXPECT_EQ(answer, Ids(ids.begin() + std::ssize(second), ids.end()));
}

}  // namespace
}  // namespace moesaic::generate
