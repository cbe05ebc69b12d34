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
  EXPECT_EQ(token_f1("МОСКВА\u3000Ärger", {"Москва ärger"}), 1);
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

TEST(NumberMatch, ComparesTheLastNumberAsTheHarnessExtractsIt) {
  EXPECT_EQ(number_match("So 16 - 3 = 13 eggs.\n#### 13", {"13"}), 1);
  EXPECT_EQ(number_match("She makes $1,300.", {"1300"}), 1);  // , and $ and the full stop go
  EXPECT_EQ(number_match("13 eggs, not 12", {"13"}), 0);      // the last one counts
  EXPECT_EQ(number_match("It is -5", {"-5"}), 1);
  EXPECT_EQ(number_match("It is 5-3", {"-3"}), 1);
  EXPECT_EQ(number_match("5.0", {"5"}), 0);  // as text
  EXPECT_EQ(number_match("none", {"5"}), 0);
  EXPECT_EQ(number_match("", {""}), 0);
}

TEST(ExactMatchOfMgsm, BehindTheHarnessesFilters) {
  EXPECT_EQ(flexible_extract("So it is $1,000.", {"1000"}), 1);
  EXPECT_EQ(flexible_extract("-2.5", {"25"}), 1);  // punctuation apart
  EXPECT_EQ(flexible_extract("none", {"Invalid"}), 1);
  EXPECT_EQ(remove_whitespace("\u3000 18.\u2028 ", {"18"}), 1);
  EXPECT_EQ(remove_whitespace(" 18 ,\u00a0", {"18"}), 0);
  EXPECT_EQ(remove_whitespace("It is 18", {"18"}), 0);
}

TEST(LastNumber, TakesRunsOfItsSignsFromTheLeft) {
  EXPECT_EQ(last_number("a 12 b -3.5 c"), "-3.5");
  EXPECT_EQ(last_number("5 , 6 ."), "6");     // a lone stop is no number
  EXPECT_EQ(last_number("7... "), "7..");     // one stop goes
  EXPECT_EQ(last_number("is 4 ... "), "..");  // two stops and more match the harness's expression
  EXPECT_EQ(last_number("--8"), "-8");
  EXPECT_EQ(last_number("8-"), "8");
  EXPECT_EQ(last_number("9 $"), "9");
}

TEST(MeanOf, StandardErrorIsTheSampleDeviationOverRootN) {
  // values 0, 0, 1, 1: mean 1/2, sample variance (4/4)/3 = 1/3, error sqrt(1/3/4)
  const Mean mean = mean_of({0, 0, 1, 1});
  EXPECT_DOUBLE_EQ(mean.value, 0.5);
  EXPECT_DOUBLE_EQ(mean.standard_error, std::sqrt(1.0 / 12.0));
  EXPECT_TRUE(std::isnan(mean_of({0.25}).standard_error));
}

TEST(MedianOf, MiddleOrMeanOfTheMiddleTwo) {
  EXPECT_EQ(median_of({3, 1, 2}), 2);
  EXPECT_EQ(median_of({4, 1, 2, 3}), 2.5);
}

}  // namespace
}  // namespace moesaic::eval
