// The definition is transformers' (src/transformers/generation/utils.py, _beam_search); tests/parity/test_generate.py
// compares with it. Here: small tables by hand, and that a batch with memories gives what full passes give.
#include "moesaic/generate/beam_search.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "moesaic/base/check.h"
#include "tests/compose/small_models.h"
#include "tests/generate/tiny_model.h"
#include "tests/models/tiny_models.h"

namespace moesaic::generate {
namespace {

using ::testing::ElementsAre;
using Ids = std::vector<int64_t>;
using Rows = std::vector<std::vector<double>>;

constexpr int64_t kEos = 3;

/// log of each row's probabilities, float32.
torch::Tensor logs(const Rows& rows) {
  std::vector<torch::Tensor> all;
  for (const auto& row : rows) all.push_back(torch::tensor(row, torch::kFloat64).log().to(torch::kFloat32));
  return torch::stack(all);
}

/// Two beams over tokens 0 to 2 and the EOS 3.
BeamSearch two_beams(SamplingOptions options = {}) {
  options.num_beams = 2;
  options.eos_ids = {kEos};
  return {options, {}, nullptr};
}

std::vector<Ids> ids_of(const std::vector<Hypothesis>& hypotheses) {
  std::vector<Ids> ids;
  for (const Hypothesis& each : hypotheses) ids.push_back(each.ids);
  return ids;
}

TEST(BeamSearch, KeepsTheLikeliestContinuationsOfAll) {
  BeamSearch search = two_beams({.max_new_tokens = 2});
  search.step(logs({{0.5, 0.4, 0.06, 0.04}}));
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids{0}, Ids{1}));
  // 0.5 * 0.4 = 0.2, 0.4 * 0.9 = 0.36: what a greedy answer begins with loses.
  search.step(logs({{0.4, 0.3, 0.2, 0.1}, {0.04, 0.03, 0.9, 0.03}}));
  ASSERT_TRUE(search.done());
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({1, 2}), Ids({0, 0})));
  EXPECT_FLOAT_EQ(search.answers()[0].score, static_cast<float>(std::log(0.36) / 2));
  EXPECT_FALSE(search.answers()[0].stopped);
}

TEST(BeamSearch, OnlyWhatEndsAmongTheFirstIsAnAnswer) {
  BeamSearch search = two_beams();
  search.step(logs({{0.5, 0.4, 0.06, 0.04}}));
  // By likelihood: 0 EOS 0.425; 1 0 0.22; 1 EOS 0.16, the third of two beams; 0 0 0.03.
  search.step(logs({{0.06, 0.05, 0.04, 0.85}, {0.55, 0.03, 0.02, 0.4}}));
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({0, kEos})));
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids({1, 0}), Ids({0, 0})));
}

TEST(BeamSearch, RowsSayWhatTheyContinue) {
  BeamSearch search = two_beams();
  search.step(logs({{0.5, 0.4, 0.06, 0.04}}));
  search.step(logs({{0.1, 0.1, 0.1, 0.7}, {0.5, 0.3, 0.1, 0.1}}));
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids({1, 0}), Ids({1, 1})));
  EXPECT_EQ(search.running()[0].parent, 1);
  EXPECT_EQ(search.running()[1].parent, 1);
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({0, kEos})));
  EXPECT_TRUE(search.answers()[0].stopped);
}

TEST(BeamSearch, AnEosBehindTheFirstBeamsIsNoAnswer) {
  BeamSearch search = two_beams();
  search.step(logs({{0.5, 0.3, 0.05, 0.15}}));
  EXPECT_TRUE(search.answers().empty());
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids{0}, Ids{1}));
}

TEST(BeamSearch, OfEqualsTheBetterHypothesisAndTheSmallerTokenComeFirst) {
  BeamSearch search = two_beams({.max_new_tokens = 2});
  search.step(logs({{0.25, 0.25, 0.25, 0.25}}));
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids{0}, Ids{1}));
  search.step(logs({{0.1, 0.4, 0.4, 0.1}, {0.4, 0.4, 0.1, 0.1}}));
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({0, 1}), Ids({0, 2})));
}

/// log p: (3) -0.92, then (0 3) -0.82 - 0.22 and (1 ...) on. What ends first, with two answers behind the second step.
BeamSearch with_two_answers(const SamplingOptions& options) {
  BeamSearch search = two_beams(options);
  search.step(logs({{0.44, 0.12, 0.04, 0.40}}));
  search.step(logs({{0.15, 0.04, 0.01, 0.80}, {0.97, 0.01, 0.01, 0.01}}));
  return search;
}

TEST(BeamSearch, EarlyStoppingSaysWhenItIsDone) {
  // Answers: log 0.4 = -0.92 and log 0.352 / 2 = -0.52; 0.12 * 0.97 = 0.116 runs on, log 0.116 / 2 = -1.08.
  const auto begun = with_two_answers({.max_new_tokens = 10, .early_stopping = "true"});
  EXPECT_TRUE(begun.done());
  EXPECT_THAT(ids_of(begun.answers()), ElementsAre(Ids({0, kEos}), Ids{kEos}));
  EXPECT_TRUE(with_two_answers({.max_new_tokens = 10, .early_stopping = "false"}).done()) << "-1.08 < -0.92";
  // With all ten tokens it might still have -2.15 / 10 = -0.22.
  EXPECT_FALSE(with_two_answers({.max_new_tokens = 10, .early_stopping = "never"}).done());
  EXPECT_TRUE(with_two_answers({.max_new_tokens = 2, .early_stopping = "never"}).done());
  // Without a penalty -2.15 can only fall: below -1.04 of (0 3).
  EXPECT_TRUE(with_two_answers({.max_new_tokens = 10, .length_penalty = 0, .early_stopping = "never"}).done());
}

TEST(BeamSearch, TheLengthPenaltyWeighsLengthAgainstProbability) {
  // log 0.4 / 1 against log 0.352 / 2^penalty.
  EXPECT_THAT(ids_of(with_two_answers({.length_penalty = 1}).answers()), ElementsAre(Ids({0, kEos}), Ids{kEos}));
  EXPECT_THAT(ids_of(with_two_answers({.length_penalty = 0}).answers()), ElementsAre(Ids{kEos}, Ids({0, kEos})));
  const auto shorter = with_two_answers({.length_penalty = -1});
  EXPECT_THAT(ids_of(shorter.answers()), ElementsAre(Ids{kEos}, Ids({0, kEos})));
  EXPECT_FLOAT_EQ(shorter.answers()[1].score, static_cast<float>(std::log(0.44 * 0.8) * 2));
}

TEST(BeamSearch, ABetterAnswerDisplacesTheWorst) {
  BeamSearch search = with_two_answers({.max_new_tokens = 10, .early_stopping = "never"});
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids({1, 0}), Ids({0, 0})));
  search.step(logs({{0.005, 0.004, 0.001, 0.99}, {0.3, 0.3, 0.3, 0.1}}));
  // log(0.12 * 0.97 * 0.99) / 3 = -0.72 beats log 0.4 = -0.92.
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({0, kEos}), Ids({1, 0, kEos})));
}

TEST(BeamSearch, APenaltyOnRepetitionsSeesEveryHypothesisOfItsOwn) {
  SamplingOptions options{.max_new_tokens = 2, .repetition_penalty = 10, .num_beams = 2};
  BeamSearch search(options, /*continued=*/{2}, nullptr);
  search.step(logs({{0.2, 0.1, 0.69, 0.01}}));  // log 0.69 * 10 = -3.7
  EXPECT_THAT(ids_of(search.running()), ElementsAre(Ids{0}, Ids{1}));
  search.step(logs({{0.7, 0.1, 0.1, 0.1}, {0.7, 0.1, 0.1, 0.1}}));
  EXPECT_THAT(ids_of(search.answers()), ElementsAre(Ids({1, 0}), Ids({0, 1})));
}

TEST(BeamSearch, RefusesFiguresThatAreNotNumbers) {
  BeamSearch search = two_beams();
  EXPECT_THROW(search.step(torch::full({1, 4}, std::nanf(""))), DataError);
}

/// The same search by full passes over prompt and beginning, without a memory.
std::vector<Hypothesis> by_full_passes(models::LanguageModel& model, const Ids& prompt,
                                       const SamplingOptions& options) {
  torch::NoGradGuard no_grad;
  BeamSearch search(options, model.continued(prompt), nullptr);
  while (!search.done()) {
    std::vector<torch::Tensor> rows;
    for (const Hypothesis& beginning : search.running()) {
      Ids text = prompt;
      text.insert(text.end(), beginning.ids.begin(), beginning.ids.end());
      nn::Pass pass;
      const models::Text whole{nn::RaggedBatch::from_sequences({text}), {{std::ssize(prompt)}}};
      const torch::Tensor hidden = model.hidden(whole, pass);
      rows.push_back(model.head().logits(hidden.slice(0, hidden.size(0) - 1)).log_softmax(1));
    }
    search.step(torch::cat(rows));
  }
  return search.answers();
}

void expect_full_passes(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer,
                        const std::vector<Prompt>& prompts, SamplingOptions options) {
  options.num_return_sequences = options.num_beams;
  const auto answers = generate(model, tokenizer, prompts, options);
  ASSERT_EQ(std::ssize(answers), std::ssize(prompts) * options.num_beams);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto expected = by_full_passes(model, prompts[i].ids, options);
    ASSERT_EQ(std::ssize(expected), options.num_beams);
    for (size_t beam = 0; beam < expected.size(); ++beam) {
      const Generation& answer = answers[i * options.num_beams + beam];
      EXPECT_EQ(answer.ids, expected[beam].ids) << i << " " << beam;
      EXPECT_NEAR(answer.score, expected[beam].score, 1e-4) << i << " " << beam;
      EXPECT_EQ(answer.finish_reason, expected[beam].stopped ? "stop" : "length");
    }
  }
}

std::shared_ptr<models::Seq2SeqLM> tiny_t5() {
  Json config = test::tiny_seq2seq_configs()[1].second;
  config["vocab_size"] = testing::kTinyVocab;
  return test::random_seq2seq(config);
}

class Beams : public ::testing::Test {
 protected:
  std::shared_ptr<models::CausalLM> model_ = testing::tiny_model();
  std::shared_ptr<tokenizer::Tokenizer> tokenizer_ = testing::word_tokenizer();
  const std::vector<Prompt> prompts_{{{5, 6, 7}}, {{8}}, {{3, 9, 4, 11, 12, 20, 21}}};
  // Ends at different times, so that prompts leave the batch one by one.
  const SamplingOptions options_{.max_new_tokens = 9, .eos_ids = {1, 13, 17}, .num_beams = 4};
};

TEST_F(Beams, OfADecoderInARaggedBatchEqualFullPasses) { expect_full_passes(*model_, *tokenizer_, prompts_, options_); }

TEST_F(Beams, OfAnEncoderDecoderInARaggedBatchEqualFullPasses) {
  expect_full_passes(*tiny_t5(), *tokenizer_, prompts_, options_);
}

TEST_F(Beams, OfACompositionInARaggedBatchEqualFullPasses) {
  const auto composition = test::two_tokenizers();
  const auto& tokenizer = *composition->anchor_member().tokenizer;
  std::vector<Prompt> prompts;
  for (const char* text : {"The keeper wrote un", "x", "คนเฝ้า 👍🏽"})
    prompts.push_back({tokenizer.encode(text, false)});
  expect_full_passes(*composition, tokenizer, prompts, {.max_new_tokens = 8, .num_beams = 3});
}

TEST_F(Beams, FollowTheirSentences) {
  testing::SentenceScales::attach(*model_);
  std::vector<Prompt> prompts = prompts_;
  const std::vector<float> sentences{1.0f, -2.0f, 3.0f};
  for (size_t i = 0; i < 3; ++i) prompts[i].sentence = {sentences[i]};
  const auto together = generate(*model_, *tokenizer_, prompts, options_);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(together[i].ids, generate(*model_, *tokenizer_, {prompts[i]}, options_)[0].ids) << i;
  }
}

TEST_F(Beams, APromptIsComputedOnce) {
  std::vector<Ids> passes;
  const Hooks hooks{nullptr, [&](const auto&, const Ids& sequences) { passes.push_back(sequences); }};
  generate(*model_, *tokenizer_, {prompts_[0], prompts_[1]}, {.max_new_tokens = 2, .num_beams = 3}, hooks);
  EXPECT_THAT(passes, ElementsAre(Ids({0, 1}), Ids({0, 0, 0, 1, 1, 1})));
  passes.clear();
  generate(*model_, *tokenizer_, {prompts_[0], prompts_[1]},
           {.max_new_tokens = 2, .temperature = 1, .num_return_sequences = 2}, hooks);
  EXPECT_THAT(passes, ElementsAre(Ids({0, 1}), Ids({0, 1, 0, 1})));
}

TEST_F(Beams, AStopStringEndsABeamAndIsCutFromIt) {
  SamplingOptions options{.max_new_tokens = 6, .num_beams = 3};
  const Generation plain = generate(*model_, *tokenizer_, {prompts_[2]}, options)[0];
  const std::string before = tokenizer_->decode({plain.ids.begin(), plain.ids.begin() + 2}, true);
  const std::string through = tokenizer_->decode({plain.ids.begin(), plain.ids.begin() + 3}, true);
  options.stop = {through.substr(before.size())};
  options.length_penalty = 0;  // what ends early has the larger sum
  options.num_return_sequences = 3;
  int64_t stopped = 0;
  for (const Generation& answer : generate(*model_, *tokenizer_, {prompts_[2]}, options)) {
    EXPECT_EQ(answer.text.find(options.stop[0]), std::string::npos);
    const std::string whole = tokenizer_->decode(answer.ids, true);
    EXPECT_EQ(answer.finish_reason == "stop", whole.find(options.stop[0]) != std::string::npos) << whole;
    stopped += answer.finish_reason == "stop";
  }
  EXPECT_GT(stopped, 0);
}

TEST_F(Beams, TheTextIsWithoutTheEos) {
  for (const Generation& answer : generate(*model_, *tokenizer_, prompts_, options_)) {
    Ids shown = answer.ids;
    if (answer.finish_reason == "stop") shown.pop_back();
    EXPECT_EQ(answer.text, tokenizer_->decode(shown, true));
  }
}

TEST_F(Beams, SeveralDrawsAreThoseOfTheirNumbers) {
  SamplingOptions options{.max_new_tokens = 8, .temperature = 1, .num_return_sequences = 3, .seed = 4, .first = 2};
  const auto t5 = tiny_t5();
  for (models::LanguageModel* model : std::initializer_list<models::LanguageModel*>{model_.get(), t5.get()}) {
    const auto together = generate(*model, *tokenizer_, prompts_, options);
    ASSERT_EQ(together.size(), 9);
    for (size_t i = 0; i < together.size(); ++i) {
      SamplingOptions alone = options;
      alone.num_return_sequences = 1;
      alone.first = options.first * 3 + static_cast<int64_t>(i);
      EXPECT_EQ(together[i].ids, generate(*model, *tokenizer_, {prompts_[i / 3]}, alone)[0].ids) << i;
    }
    EXPECT_NE(together[0].ids, together[1].ids);
  }
}

TEST_F(Beams, WhatCannotBeIsRefused) {
  auto refused = [&](const SamplingOptions& options, const char* why) {
    try {
      generate(*model_, *tokenizer_, prompts_, options);
      ADD_FAILURE() << why;
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr(why));
    }
  };
  refused({.num_beams = 0}, "num_beams");
  refused({.temperature = 1, .num_beams = 2}, "temperature");
  refused({.num_beams = 2, .num_return_sequences = 3}, "num_return_sequences");
  refused({.num_return_sequences = 2}, "all answers would be the same");
  refused({.length_penalty = 2}, "length_penalty");
  refused({.early_stopping = "true"}, "early_stopping");
  refused({.num_beams = 2, .early_stopping = "often"}, "early_stopping");
  refused({.eos_ids = {1, 2}, .num_beams = 9}, "27 candidates");
  const Hooks stream{[](int64_t, const std::string&) { return true; }};
  EXPECT_THROW(generate(*model_, *tokenizer_, prompts_, options_, stream), UsageError);
  Session session(*model_, *tokenizer_);
  EXPECT_THROW(session.answer(prompts_[0], options_), UsageError);
}

}  // namespace
}  // namespace moesaic::generate
