#include "moesaic/eval/metrics.h"

#include <gtest/gtest.h>

namespace moesaic::eval {
namespace {

TEST(ExactMatch, ComparesWordsAsWritten) {
  EXPECT_EQ(exact_match("  New  York\n", {"Paris", "New York"}), 1);
  EXPECT_EQ(exact_match("new york", {"New York"}), 0);
  EXPECT_EQ(exact_match("-5", {"5"}), 0);
  EXPECT_EQ(exact_match("5", {"5", "five"}), 1);  // the best of the references
}

TEST(NormalizeSquad, LowersDropsPunctuationAndArticles) {
  EXPECT_EQ(normalize_squad("The  cat's A-team, an OWL!"), "cats ateam owl");
}

TEST(TokenF1, CountsSharedWordsOnce) {
  // answer {cat, sat, cat}, reference {cat, sat, down}: 2 in common, 2*2/(3+3)
  EXPECT_DOUBLE_EQ(token_f1("the cat sat cat", {"a cat sat down"}), 2.0 / 3.0);
  EXPECT_EQ(token_f1("dog", {"cat", "the dog"}), 1);
  EXPECT_EQ(token_f1("dog", {"cat"}), 0);
}

TEST(TokenF1, AnswersThatNormaliseToNothingAreComparedAsTheyAre) {
  EXPECT_EQ(token_f1("A", {"A"}), 1);
  EXPECT_EQ(token_f1("A", {"The"}), 0);
}

TEST(RougeL, IsF1OfTheLongestCommonSubsequence) {
  // lcs(police kill the gunman, police killed the gunman) = police the gunman: P = R = 3/4
  EXPECT_DOUBLE_EQ(rouge_l("Police kill the gunman.", {"police killed the gunman"}), 0.75);
  // lcs = the gunman, P = R = 2/4
  EXPECT_DOUBLE_EQ(rouge_l("the gunman kill police", {"police killed the gunman"}), 0.5);
  EXPECT_EQ(rouge_l("", {"police"}), 0);
  EXPECT_DOUBLE_EQ(rouge_l("the", {"the the"}), 2.0 / 3.0);     // a word stands for one other: lcs = the
  EXPECT_EQ(rouge_l("ça va", {"ÇA"}), rouge_l("a va", {"a"}));  // bytes outside ASCII separate words
}

TEST(RougeL, OtherAlphabetsByWhitespaceWords) {
  EXPECT_EQ(rouge_l("Привет мир", {"Привет мир"}), 1);
  EXPECT_EQ(rouge_l("Привет", {"мир"}), 0);
}

TEST(MeanOf, StandardErrorIsTheSampleDeviationOverRootN) {
  // values 0, 0, 1, 1: mean 1/2, sample variance (4/4)/3 = 1/3, error sqrt(1/3/4)
  const Mean mean = mean_of({0, 0, 1, 1});
  EXPECT_DOUBLE_EQ(mean.value, 0.5);
  EXPECT_DOUBLE_EQ(mean.standard_error, std::sqrt(1.0 / 12.0));
  EXPECT_EQ(mean_of({0.25}).standard_error, 0);
}

TEST(MedianOf, MiddleOrMeanOfTheMiddleTwo) {
  EXPECT_EQ(median_of({3, 1, 2}), 2);
  EXPECT_EQ(median_of({4, 1, 2, 3}), 2.5);
}

}  // namespace
}  // namespace moesaic::eval
