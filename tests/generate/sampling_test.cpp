// Expected values follow transformers' logits processors: src/transformers/generation/logits_process.py.
#include "moesaic/generate/sampling.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "moesaic/base/check.h"

namespace moesaic::generate {
namespace {

using ::testing::ElementsAre;
using ::testing::FloatEq;
using ::testing::HasSubstr;

constexpr float kGone = -std::numeric_limits<float>::infinity();

/// Logits of these probabilities.
std::vector<float> logits_of(std::vector<double> probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

std::vector<bool> kept(const std::vector<float>& logits) {
  std::vector<bool> result;
  for (float z : logits) result.push_back(z != kGone);
  return result;
}

TEST(RepetitionPenalty, DividesPositiveAndMultipliesNegativeOncePerToken) {
  std::vector<float> logits{2, -2, 4, -4, 0};
  apply_repetition_penalty(logits, {0, 1, 0, 0}, 2.0);
  EXPECT_THAT(logits, ElementsAre(1, -4, 4, -4, 0));
}

TEST(TopK, KeepsTheLargestAndTies) {
  std::vector<float> logits{1, 3, 2, 2, 0};
  apply_top_k(logits, 2);
  EXPECT_THAT(logits, ElementsAre(kGone, 3, 2, 2, kGone));
  apply_top_k(logits, 9);  // more than there are
  EXPECT_THAT(logits, ElementsAre(kGone, 3, 2, 2, kGone));
}

TEST(TopP, KeepsTheSmallestSetThatReachesP) {
  std::vector<float> logits = logits_of({0.1, 0.5, 0.15, 0.25});
  apply_top_p(logits, 0.7);  // 0.5 < 0.7, 0.5 + 0.25 >= 0.7
  EXPECT_THAT(kept(logits), ElementsAre(false, true, false, true));
  logits = logits_of({0.1, 0.5, 0.15, 0.25});
  apply_top_p(logits, 0.8);
  EXPECT_THAT(kept(logits), ElementsAre(false, true, true, true));
  logits = logits_of({0.1, 0.5, 0.15, 0.25});
  apply_top_p(logits, 1e-9);
  EXPECT_THAT(kept(logits), ElementsAre(false, true, false, false));
}

TEST(TopP, StopsWhenPIsReachedAndPrefersTheFirstOfEquals) {
  std::vector<float> logits(4, 0.0f);  // 0.25 each, exactly
  apply_top_p(logits, 0.5);
  EXPECT_THAT(kept(logits), ElementsAre(true, true, false, false));
}

TEST(MinP, IsRelativeToTheMostProbable) {
  std::vector<float> logits = logits_of({0.5, 0.24, 0.26});
  apply_min_p(logits, 0.5);  // 0.5 * 0.5 = 0.25
  EXPECT_THAT(kept(logits), ElementsAre(true, false, true));
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  Sampler sampler({}, 0);
  std::vector<float> logits{1, 3, 3, 2};
  EXPECT_EQ(sampler.next(logits, {}, 0), 1);
}

TEST(Sampler, GreedyHonoursTheRepetitionPenalty) {
  Sampler sampler({.repetition_penalty = 2.0}, 0);
  std::vector<float> logits{3, 2};
  EXPECT_EQ(sampler.next(logits, {0}, 0), 1);
}

TEST(Sampler, PenaltiesCountTheAnswerAlone) {
  std::vector<float> logits{3, 3, 3, 3};
  apply_penalties(logits, std::vector<int64_t>{1, 2, 2}, 0.5, 0.25);
  EXPECT_THAT(logits, ElementsAre(3, 2.25f, 1.75f, 3));
  Sampler sampler({.presence_penalty = 1.0}, 0);
  logits = {3, 2.5, 0, 0};
  EXPECT_EQ(sampler.next(logits, {0, 0}, 2), 0) << "the prompt's tokens go free";
  logits = {3, 2.5, 0, 0};
  EXPECT_EQ(sampler.next(logits, {0, 0}, 1), 1);
}

TEST(Sampler, BiasForbidsAndTheEndWaitsForItsTime) {
  const float none = -std::numeric_limits<float>::infinity();
  Sampler biased({.logit_bias = {{0, none}, {2, 5.0}}}, 0);
  std::vector<float> logits{9, 3, 0, 0};
  EXPECT_EQ(biased.next(logits, {}, 0), 2);
  Sampler everything({.logit_bias = {{0, none}, {1, none}}}, 0);
  logits = {9, 3};
  EXPECT_THROW(everything.next(logits, {}, 0), UsageError);
  Sampler patient({.eos_ids = {0}, .min_new_tokens = 2}, 0);
  for (int64_t length = 0; length < 3; ++length) {
    logits = {9, 3};
    EXPECT_EQ(patient.next(logits, std::vector<int64_t>(1 + length, 1), 1), length < 2 ? 1 : 0);
  }
}

TEST(Sampler, DrawsWithTheProbabilitiesOfTheTemperature) {
  // p = 0.8, 0.2 at temperature 2 is sqrt(p) normalised: 2/3, 1/3
  Sampler sampler({.temperature = 2.0}, 7);
  const int draws = 20000;
  int first = 0;
  for (int i = 0; i < draws; ++i) {
    std::vector<float> logits = logits_of({0.8, 0.2});
    first += sampler.next(logits, {}, 0) == 0;
  }
  // five standard deviations: 5 sqrt(2/9 / 20000) = 0.0167
  EXPECT_NEAR(first / static_cast<double>(draws), 2.0 / 3.0, 0.0167);
}

TEST(Sampler, FiltersInTransformersOrder) {
  // top_k 3 leaves 0.4, 0.3, 0.2, renormalised 4/9, 3/9, 2/9; of these top_p 0.75 keeps the first two (7/9), which it
  // would not over all four (0.7 < 0.75).
  Sampler sampler({.temperature = 1.0, .top_k = 3, .top_p = 0.75}, 1);
  for (int i = 0; i < 200; ++i) {
    std::vector<float> logits = logits_of({0.1, 0.4, 0.2, 0.3});
    const int64_t token = sampler.next(logits, {}, 0);
    EXPECT_TRUE(token == 1 || token == 3) << token;
  }
}

TEST(Sampler, FiltersWhatTheTemperatureLeaves) {
  // At temperature 0.5 probabilities are squared: 0.25, 0.09, 0.04 of 0.38. The first has 0.66 of them and is enough
  // for top_p 0.6; its 0.5 at temperature 1 would not be.
  Sampler sampler({.temperature = 0.5, .top_p = 0.6}, 1);
  for (int i = 0; i < 100; ++i) {
    std::vector<float> logits = logits_of({0.3, 0.5, 0.2});
    EXPECT_EQ(sampler.next(logits, {}, 0), 1);
  }
}

TEST(Sampler, SameSeedSameTokens) {
  Sampler a({.temperature = 1.0}, 5), b({.temperature = 1.0}, 5), c({.temperature = 1.0}, 6);
  std::vector<int64_t> from_a, from_b, from_c;
  for (int i = 0; i < 50; ++i) {
    std::vector<float> logits(100, 0.0f), copy = logits, other = logits;
    from_a.push_back(a.next(logits, {}, 0));
    from_b.push_back(b.next(copy, {}, 0));
    from_c.push_back(c.next(other, {}, 0));
  }
  EXPECT_EQ(from_a, from_b);
  EXPECT_NE(from_a, from_c);
}

TEST(Sampler, RefusesLogitsThatAreNotNumbers) {
  Sampler sampler({}, 0);
  std::vector<float> nan{1, std::nanf(""), 0}, none{kGone, kGone};
  EXPECT_THROW(sampler.next(nan, {}, 0), DataError);
  EXPECT_THROW(sampler.next(none, {}, 0), DataError);
}

TEST(Validate, NamesEverythingOutOfRange) {
  try {
    validate({.max_new_tokens = 0, .temperature = -1, .top_k = -2, .top_p = 0, .min_p = 2, .repetition_penalty = 0});
    FAIL();
  } catch (const UsageError& error) {
    for (const char* name : {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}) {
      EXPECT_THAT(error.what(), HasSubstr(name));
    }
  }
  EXPECT_NO_THROW(validate({}));
}

}  // namespace
}  // namespace moesaic::generate
