#include "moesaic/eval/corpus_metrics.h"

#include <gtest/gtest.h>

#include <cmath>

namespace moesaic::eval {
namespace {

// tests/parity/test_metrics.py compares chrF and BLEU with sacrebleu; here are the definitions.

TEST(Chrf, IsTheFScoreOfCharacterNgramsWithoutBlanks) {
  // "a b c" = abc against abd: orders 1 to 3 have 3, 2, 1 n-grams on both sides and 2, 1, 0 in common.
  // P = R = F = (2/3 + 1/2 + 0) / 3
  const double expected = 100 * (2.0 / 3 + 1.0 / 2) / 3;
  EXPECT_DOUBLE_EQ(chrf({"a b c"}, {{"abd"}}), expected);
  EXPECT_DOUBLE_EQ(chrf({"a b c"}, {{"abd"}}, 1), expected);
}

TEST(Chrf, BetaWeighsRecall) {
  // a against ab: order 1 alone is in both; P = 1, R = 1/2
  EXPECT_DOUBLE_EQ(chrf({"a"}, {{"ab"}}, 2), 100 * 5 * 0.5 / (4 + 0.5));
  EXPECT_DOUBLE_EQ(chrf({"a"}, {{"ab"}}, 1), 100 * 2 * 0.5 / (1 + 0.5));
}

TEST(Chrf, CountsCodePointsAndSurvivesBrokenText) {
  EXPECT_DOUBLE_EQ(chrf({"é"}, {{"é"}}), 100);
  EXPECT_EQ(chrf({"é"}, {{"è"}}), 0);  // they share their first byte
  EXPECT_DOUBLE_EQ(chrf({"\xC3"}, {{"\xC3"}}), 100);
  EXPECT_EQ(chrf({"\xF0\x9F"}, {{"x"}}), 0);
  EXPECT_EQ(chrf({}, {}), 0);
}

TEST(Bleu, IsTheGeometricMeanOfPrecisionsAndABrevityPenalty) {
  // 5 of 6 words, 4 of 5, 3 of 4, 2 of 3; 6 words against 8
  const double precision = std::pow(5.0 / 6 * 4 / 5 * 3 / 4 * 2 / 3, 0.25);
  EXPECT_NEAR(bleu({"a b c d e x"}, {{"a b c d e f g h"}}), 100 * precision * std::exp(1 - 8.0 / 6), 1e-9);
}

TEST(Bleu, OrdersWithoutAMatchCountHalfAQuarterAndSoOn) {
  // a b x c: words 3/4, pairs 1/3, triples 0/2 -> (1/2)/2, fours 0/1 -> (1/4)/1
  EXPECT_NEAR(bleu({"a b x c"}, {{"a b y c"}}), 100 * std::pow(3.0 / 4 / 3 / 4 / 4, 0.25), 1e-9);
  EXPECT_EQ(bleu({"a b c"}, {{"a b c"}}), 0);  // no n-gram of order 4 at all
}

struct CodexglueCase {
  const char* what;
  std::vector<std::string> answers;
  std::vector<References> references;
  double score;
};

// Scores of Code-Text/code-to-text/evaluator/evaluator.py of microsoft/CodeXGLUE, commit ac74a62: bleuFromMaps over
// splitPuncts(text.strip().lower()) of each text, as its computeMaps makes them.
const CodexglueCase kCodexglue[] = {
    {"equal", {"Returns the sum of two numbers ."}, {{"Returns the sum of two numbers ."}}, 100.0},
    {"short", {"Return sum"}, {{"Returns the sum of two numbers."}}, 13.355521956713712},
    {"nothing in common", {"foo bar"}, {{"Returns the sum of two numbers."}}, 1.63116154205033e-76},
    {"empty answer", {""}, {{"Returns the sum."}}, 1.8315638888734178},
    {"both empty", {""}, {{""}}, 100.0},
    {"underscores and marks",
     {"Call `foo_bar` (x), then x-1; see https://a.b/c."},
     {{"Calls foo_bar(x) and then x - 1. See https://a.b/c"}},
     56.648580643173794},
    {"numbers", {"Version 1.2, at most 1,000 items"}, {{"version 1.2 or at most 1,000 items"}}, 73.3365826056299},
    {"repeats", {"the the the the the the"}, {{"the cat is on the mat"}}, 22.95748846661433},
    {"two references, the shortest length",
     {"Add a b"},
     {{"Add a and b to the list of all things", "Adds a b"}},
     84.08964152537145},
    {"entities stay", {"a &amp; b &lt; c &quot;x&quot;"}, {{"a & b < c \"x\""}}, 11.678449443205002},
    {"case and accents", {"Ça VA: ÉCOLE “naïve” — test"}, {{"ça va : école \"naïve\" - test"}}, 42.210681263745265},
    {"a mean over answers",
     {"Returns true if the file exists.", "Opens it.", "xyz", "Set the value of an item"},
     {{"Return true if file exists"}, {"Opens the file for reading."}, {"Never ."}, {"Sets the value of the item"}},
     25.014801116888425},
};

TEST(CodexglueBleu, GivesTheScriptsScores) {
  for (const CodexglueCase& example : kCodexglue) {
    EXPECT_NEAR(codexglue_bleu(example.answers, example.references), example.score, 1e-9) << example.what;
  }
  EXPECT_EQ(codexglue_bleu({}, {}), 0);
}

}  // namespace
}  // namespace moesaic::eval
