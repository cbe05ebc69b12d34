#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::tokenizer {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

using Texts = std::vector<std::string>;

TEST(TrainTokenizer, MergesTheMostFrequentPairsFirst) {
  // Pairs: "ab" stands 6 times, "abc" then 3 times, " abc" (a blank is the byte's letter Ġ) twice; "xy" once only.
  const auto tokenizer = Tokenizer::train({"abc abc abc", "abd abe ab xy"}, 259 + 3);
  EXPECT_EQ(tokenizer->vocab_size(), 262);
  EXPECT_EQ(tokenizer->id_to_token(0), "<bos>");
  EXPECT_EQ(tokenizer->id_to_token(1), "<eos>");
  EXPECT_EQ(tokenizer->id_to_token(2), "<pad>");
  EXPECT_EQ(tokenizer->id_to_token(259), "ab");
  EXPECT_EQ(tokenizer->id_to_token(260), "Ġab");
  EXPECT_EQ(tokenizer->id_to_token(261), "Ġabc");
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_EQ(tokenizer->eos_id(), 1);
  EXPECT_THAT(tokenizer->encode("ab abc", true), ElementsAre(0, 259, 261));
}

TEST(TrainTokenizer, StopsWhenNoPairOccursTwice) {
  EXPECT_EQ(Tokenizer::train({"ab", "cd"}, 1000)->vocab_size(), 259);
  EXPECT_EQ(Tokenizer::train({}, 1000)->vocab_size(), 259);
  EXPECT_EQ(Tokenizer::train({"ab", "ab"}, 1000)->vocab_size(), 260);
}

TEST(TrainTokenizer, DigitsStandAloneAndEveryTextComesBack) {
  const auto tokenizer = Tokenizer::train({"12 12 12 12", "x12 x12 é é é"}, 300);
  EXPECT_EQ(tokenizer->encode("1212", false).size(), 4u);
  for (const std::string text : {"12 é x12", "never seen: Ω\n\t人 <eos>", " two  blanks ", ""}) {
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text, false), false), text);
  }
}

TEST(TrainTokenizer, FollowsFromTheTextsWhateverTheirOrder) {
  Texts texts;
  for (int i = 0; i < 400; ++i) texts.push_back(std::to_string(i * 7919) + "word" + std::string(1, 'a' + i % 26));
  const std::string first = Tokenizer::train(texts, 400)->json();
  std::reverse(texts.begin(), texts.end());
  EXPECT_EQ(Tokenizer::train(texts, 400)->json(), first);
  texts.resize(300);
  EXPECT_NE(Tokenizer::train(texts, 400)->json(), first);
}

TEST(TrainTokenizer, RefusesWhatCannotBe) {
  EXPECT_THAT([] { Tokenizer::train({"a"}, 258); }, ThrowsMessage<UsageError>(HasSubstr("expected at least 259")));
  EXPECT_THAT([] { Tokenizer::train({"a", "\xFF"}, 300); }, ThrowsMessage<DataError>(HasSubstr("not valid UTF-8")));
}

}  // namespace
}  // namespace moesaic::tokenizer
