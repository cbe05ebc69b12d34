// An encoder-decoder through what generates and scores.
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "moesaic/generate/generate.h"
#include "tests/generate/tiny_model.h"
#include "tests/models/tiny_models.h"

namespace moesaic::generate {
namespace {

std::shared_ptr<models::Seq2SeqLM> tiny_t5() {
  Json config = test::tiny_seq2seq_configs()[1].second;
  config["vocab_size"] = testing::kTinyVocab;
  return test::random_seq2seq(config);
}

std::vector<int64_t> answer(models::LanguageModel& model, const std::vector<int64_t>& prompt) {
  return generate(model, *testing::word_tokenizer(), {{prompt}}, {.max_new_tokens = 6})[0].ids;
}

TEST(Seq2Seq, ASessionReadsAnotherPromptAnew) {
  const auto model = tiny_t5();
  const auto tokenizer = testing::word_tokenizer();
  Session session(*model, *tokenizer);
  const SamplingOptions options{.max_new_tokens = 6};
  // Half of a prompt can't be kept: every token of the encoder has seen the others.
  for (const std::vector<int64_t>& prompt :
       std::vector<std::vector<int64_t>>{{5, 6, 7}, {5, 6, 7}, {5, 6, 8, 9}, {5}}) {
    EXPECT_EQ(session.answer({prompt}, options).ids, answer(*model, prompt));
    EXPECT_EQ(session.reused(), 0);
  }
}

TEST(Seq2Seq, AnAnswersScoreIsThatOfItsTokensOneByOne) {
  torch::NoGradGuard no_grad;
  const auto model = tiny_t5();
  const std::vector<int64_t> target{9, 3, 1};
  const auto scores = score(*model, {{{5, 6, 7}}, {{8}}}, {target, {4}});
  ASSERT_EQ(scores.size(), 2);
  ASSERT_EQ(scores[0].size(), 3);
  ASSERT_EQ(scores[1].size(), 1);
  std::vector<int64_t> text{5, 6, 7};
  for (size_t i = 0; i < target.size(); ++i) {
    nn::Pass pass;
    const auto hidden = model->hidden({nn::RaggedBatch::from_sequences({text}), {{3}}}, pass);
    const auto log_probs = model->head().logits(hidden[hidden.size(0) - 1].unsqueeze(0)).log_softmax(1)[0];
    EXPECT_NEAR(scores[0][i], log_probs[target[i]].item<float>(), 1e-5);
    text.push_back(target[i]);
  }
  EXPECT_THROW(score(*model, {{{5, 6, 7}}}), UsageError);  // a prompt is not predicted
}

TEST(Score, AnAnswerBehindAPromptOfADecoder) {
  const auto model = testing::tiny_model();
  const auto whole = score(*model, {{{5, 6, 7, 9, 3}}})[0];
  const auto behind = score(*model, {{{5, 6, 7}}}, {{9, 3}})[0];
  ASSERT_EQ(behind.size(), 2);
  EXPECT_NEAR(behind[0], whole[2], 1e-6);
  EXPECT_NEAR(behind[1], whole[3], 1e-6);
}

}  // namespace
}  // namespace moesaic::generate
