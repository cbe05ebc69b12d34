#include "demos/key_arithmetic.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::demos {
namespace {

using ::testing::ElementsAre;
using ::testing::StartsWith;

std::string text_of(const std::vector<int64_t>& ids) {
  static const tokenizer::Tokenizer tokenizer(key_tokenizer_json().dump(), key_tokenizer_config(), "keys");
  return tokenizer.decode(ids, /*skip_special_tokens=*/false);
}

/// "7 3 - 0 5" and the answer behind it, or "" without one.
struct Parts {
  std::vector<std::string> keys;  // K1 op K2
  std::string expression, answer;
};
Parts parse(const data::Example& example) {
  Parts parts;
  std::istringstream words(text_of(example.ids));
  std::string word;
  words >> word;
  EXPECT_EQ(word, "<bos>");
  while (words >> word && word != ">") parts.keys.push_back(word);
  std::string* part = &parts.expression;
  while (words >> word && word != "<eos>") {
    if (word == "=") {
      part = &parts.answer;
    } else {
      *part += (part->empty() ? "" : " ") + word;
    }
  }
  EXPECT_EQ(word, "<eos>");
  return parts;
}

/// t u op t u, and the answer's digits h t u put in order.
std::tuple<int64_t, char, int64_t> numbers(const std::string& expression) {
  return {10 * (expression[0] - '0') + expression[2] - '0', expression[4],
          10 * (expression[6] - '0') + expression[8] - '0'};
}

TEST(KeyTexts, AreRightAndLearntWhereTheySay) {
  KeyTexts stream({KeyText::kSubstitution, KeyText::kArithmetic, KeyText::kComposed}, 3);
  std::map<std::string, int64_t> values;  // what each key is worth
  std::set<std::string> composed_keys;
  int64_t with_keys = 0;
  for (int64_t i = 0; i < 3000; ++i) {
    const data::Example example = *stream.next();
    const Parts parts = parse(example);
    const auto [left, op, right] = numbers(parts.expression);
    const int64_t kind = i % 3;
    const int64_t result = op == '+' ? left + right : left - right;
    EXPECT_GE(result, 0);
    if (kind == 0) {
      EXPECT_EQ(parts.answer, "");
    } else {
      EXPECT_EQ(parts.answer, fmt::format("{} {} {}", result % 10, result / 10 % 10, result / 100));
    }
    if (kind == 1) {
      with_keys += !parts.keys.empty();
    } else {
      ASSERT_EQ(parts.keys.size(), 3u);
      EXPECT_EQ(parts.keys[1], std::string(1, op));
      for (const auto& [key, value] : {std::pair(parts.keys[0], left), std::pair(parts.keys[2], right)}) {
        EXPECT_EQ(values.emplace(key, value).first->second, value) << key << " is always worth the same";
        if (kind == 2) composed_keys.insert(key);
      }
    }
    const std::string learnt = text_of({example.ids.begin() + example.prompt_ends.at(0), example.ids.end()});
    if (kind == 0) EXPECT_EQ(learnt, parts.expression + " <eos>");
    if (kind == 1) EXPECT_EQ(learnt, "= " + parts.answer + " <eos>");
    if (kind == 2) EXPECT_EQ(learnt, parts.expression + " = " + parts.answer + " <eos>");
  }
  EXPECT_NEAR(static_cast<double>(with_keys), 500, 80);
  EXPECT_EQ(composed_keys.size(), 100u) << "the keys held in";
  EXPECT_GT(values.size(), 480u);
}

TEST(KeyTexts, OtherwiseEveryKeyHasAnotherValue) {
  // The same draws: the expressions are the substitutions', the keys in front of them are not.
  KeyTexts stream({KeyText::kSubstitution}, 3), other({KeyText::kOtherwise}, 3);
  std::map<std::string, std::string> next;  // the key that a key was replaced by
  for (int64_t i = 0; i < 3000; ++i) {
    const data::Example example = *stream.next(), changed = *other.next();
    EXPECT_EQ(example.mask, changed.mask);
    const Parts parts = parse(example), otherwise = parse(changed);
    EXPECT_EQ(parts.expression, otherwise.expression);
    for (const size_t k : {0, 2}) {
      EXPECT_EQ(next.emplace(parts.keys[k], otherwise.keys[k]).first->second, otherwise.keys[k]);
      EXPECT_NE(parts.keys[k], otherwise.keys[k]);
    }
  }
  std::set<std::string> replaced;
  for (const auto& [key, other_key] : next) replaced.insert(other_key);
  EXPECT_EQ(replaced.size(), next.size()) << "no two keys by the same one";
}

TEST(KeyTexts, GoOnFromTheirState) {
  KeyTexts stream({KeyText::kComposed, KeyText::kArithmetic}, 5), other({KeyText::kComposed, KeyText::kArithmetic}, 5);
  for (int i = 0; i < 5; ++i) stream.next();
  other.set_state(stream.state());
  EXPECT_EQ(stream.next()->ids, other.next()->ids);
}

TEST(KeyQuestions, AskWhatWasNeverTrained) {
  std::set<std::string> expressions, keys;
  KeyTexts stream({KeyText::kArithmetic, KeyText::kComposed}, 1);
  for (int64_t i = 0; i < 20000; ++i) {
    const Parts parts = parse(*stream.next());
    expressions.insert(parts.expression);
    if (i % 2 == 1) keys.insert({parts.keys[0], parts.keys[2]});
  }
  for (const KeyQuestion& question : key_questions(KeyTask::kCalculate, 200, 7)) {
    const std::string text = text_of(question.prompt);
    const std::string expression = text.substr(text.find("> ") + 2);
    EXPECT_FALSE(expressions.contains(expression.substr(0, 9))) << text;
  }
  for (const KeyTask task : {KeyTask::kBoth, KeyTask::kSubstitute}) {
    for (const KeyQuestion& question : key_questions(task, 200, 7)) {
      EXPECT_FALSE(keys.contains(text_of({question.prompt[1]})));
      EXPECT_FALSE(keys.contains(text_of({question.prompt[3]})));
    }
  }
  EXPECT_EQ(key_questions(KeyTask::kBoth, 5, 7)[4].prompt, key_questions(KeyTask::kBoth, 9, 7)[4].prompt);
  EXPECT_NE(key_questions(KeyTask::kBoth, 5, 7)[4].prompt, key_questions(KeyTask::kBoth, 5, 8)[4].prompt);
}

TEST(KeyAnswers, OnlyTheWholeAnswerCounts) {
  const tokenizer::Tokenizer tokenizer(key_tokenizer_json().dump(), key_tokenizer_config(), "keys");
  auto ids = [&](const std::string& text) { return tokenizer.encode(text, false); };
  const KeyQuestion sub{{}, ids("7 3 - 0 5")}, number{{}, ids("8 6 0")};
  auto right = [&](KeyTask task, const KeyQuestion& question, const std::string& answer) {
    return key_answer_is_right(task, question, ids(answer));
  };
  EXPECT_TRUE(right(KeyTask::kSubstitute, sub, "7 3 - 0 5 <eos>"));
  EXPECT_TRUE(right(KeyTask::kSubstitute, sub, "7 3 - 0 5 = 1 1 1 <eos>"));
  EXPECT_FALSE(right(KeyTask::kSubstitute, sub, "7 3 - 0 5"));
  EXPECT_FALSE(right(KeyTask::kSubstitute, sub, "7 3 - 0 5 5 <eos>"));
  EXPECT_TRUE(right(KeyTask::kCalculate, number, "8 6 0 <eos>"));
  EXPECT_FALSE(right(KeyTask::kCalculate, number, "8 6 <eos>"));
  EXPECT_FALSE(right(KeyTask::kCalculate, number, "8 6 0"));
  EXPECT_TRUE(right(KeyTask::kBoth, number, "1 1 + 2 2 = 8 6 0 <eos>")) << "the final value alone";
  EXPECT_FALSE(right(KeyTask::kBoth, number, "8 6 0 <eos>")) << "nothing behind an =";
  EXPECT_FALSE(right(KeyTask::kBoth, number, "= 8 6 0 = 8 6 1 <eos>"));
}

}  // namespace
}  // namespace moesaic::demos
