#include "moesaic/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/tokenizer/tiny_tokenizer.h"

namespace moesaic::tokenizer {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using testing::ThrowsMessage;

TEST(Tokenizer, EncodesWithByteOffsets) {
  const auto tokenizer = tiny_tokenizer();
  // "ab", ' ', é as its two bytes (each with the whole character's range), 'b'
  const Encoding encoding = tokenizer->encode_with_offsets(
      "ab \xC3\xA9"
      "b",
      false);
  EXPECT_THAT(encoding.ids, ElementsAre(7, 4, 5, 6, 3));
  EXPECT_THAT(encoding.offsets, ElementsAre(Pair(0, 2), Pair(2, 3), Pair(3, 5), Pair(3, 5), Pair(5, 6)));
  EXPECT_EQ(tokenizer->encode("ab \xC3\xA9"
                              "b",
                              false),
            encoding.ids);
}

TEST(Tokenizer, SpecialTokensAreAddedOnRequestAndFoundInTheText) {
  const auto tokenizer = tiny_tokenizer();
  const Encoding encoding = tokenizer->encode_with_offsets("a<eos>", true);
  EXPECT_THAT(encoding.ids, ElementsAre(1, 2, 0));
  EXPECT_THAT(encoding.offsets, ElementsAre(Pair(0, 0), Pair(0, 1), Pair(1, 6)));
  EXPECT_THAT(tokenizer->encode("", true), ElementsAre(1));
  EXPECT_THAT(tokenizer->encode("", false), ElementsAre());
}

TEST(Tokenizer, TextsBeginOnceAndGoOnWithoutABlank) {
  const auto tiny = tiny_tokenizer();
  EXPECT_THAT(tiny->encode_start("ab").ids, ElementsAre(1, 7));
  EXPECT_THAT(tiny->encode_start("<bos>ab").ids, ElementsAre(1, 7));
  EXPECT_THAT(tiny->encode_start("").ids, ElementsAre(1));
  EXPECT_THAT(tiny->encode_behind("ab"), ElementsAre(7));
  // As SentencePiece does it: a blank in front of a text, also of one that has one, and none in the middle.
  const Tokenizer pieces(R"({"version": "1.0", "added_tokens": [],
      "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
      "model": {"type": "BPE", "unk_token": "u", "merges": [["▁", "a"]], "vocab": {"u": 0, "▁": 1, "a": 2, "▁a": 3}}})",
                         Json::object(), "pieces");
  EXPECT_THAT(pieces.encode("a", false), ElementsAre(3));
  EXPECT_THAT(pieces.encode(" a", false), ElementsAre(1, 3));
  EXPECT_THAT(pieces.encode_with_offsets("  a", false).offsets, ElementsAre(Pair(0, 0), Pair(0, 1), Pair(1, 3)));
  EXPECT_THAT(pieces.encode_behind("a"), ElementsAre(2));
  EXPECT_THAT(pieces.encode_behind(" a"), ElementsAre(3));
}

TEST(Tokenizer, PromptsThatStandApartAreTextsOfTheirOwn) {
  Json json = parse_json(kTinyJson, "tiny");
  json["post_processor"]["single"] = {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
                                      {{"SpecialToken", {{"id", "<eos>"}, {"type_id", 0}}}}};
  json["post_processor"]["special_tokens"] = {{"<eos>", {{"id", "<eos>"}, {"ids", {0}}, {"tokens", {"<eos>"}}}}};
  Json config{{"eos_token", "<eos>"}};
  const Tokenizer goes_on(json.dump(), config, "tiny"), apart(json.dump(), config, "tiny", /*prompts_apart=*/true);
  EXPECT_EQ(goes_on.encode_start("ab a").ids, (std::vector<int64_t>{7, 4, 2}));
  EXPECT_EQ(apart.encode_start("ab a").ids, (std::vector<int64_t>{7, 4, 2, 0}));
  EXPECT_EQ(apart.encode_behind("ab a"), (std::vector<int64_t>{7, 4, 2}));
  config["add_eos_token"] = false;
  EXPECT_EQ(Tokenizer(json.dump(), config, "tiny", true).encode_start("ab a").ids, (std::vector<int64_t>{7, 4, 2}));
  EXPECT_EQ(Tokenizer(json.dump(), config, "tiny", true).encode("ab a", true), (std::vector<int64_t>{7, 4, 2, 0}));
}

TEST(Tokenizer, Decodes) {
  const auto tokenizer = tiny_tokenizer();
  EXPECT_EQ(tokenizer->decode({1, 7, 5, 6, 0}, false), "<bos>ab\xC3\xA9<eos>");
  EXPECT_EQ(tokenizer->decode({1, 7, 5, 6, 0}, true), "ab\xC3\xA9");
  EXPECT_EQ(tokenizer->decode({}, true), "");
}

TEST(Tokenizer, KnowsItsVocabulary) {
  const auto tokenizer = tiny_tokenizer();
  EXPECT_EQ(tokenizer->vocab_size(), 9);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 0);
  EXPECT_EQ(tokenizer->eos_token(), "<eos>");
  EXPECT_EQ(tokenizer->token_to_id("ab"), 7);
  EXPECT_EQ(tokenizer->token_to_id("zz"), std::nullopt);
  EXPECT_EQ(tokenizer->id_to_token(5), "<0xC3>");
  EXPECT_EQ(tokenizer->id_to_token(9), std::nullopt);
  EXPECT_EQ(tokenizer->id_to_token(-1), std::nullopt);
  EXPECT_THAT(tokenizer->special_texts(), ElementsAre("<eos>", "<bos>"));
  EXPECT_EQ(tokenizer->json(), kTinyJson);
}

TEST(Tokenizer, ConfiguredTokensAreAddedBehindTheVocabulary) {
  const Json config = {
      {"eos_token", "<end>"},
      {"added_tokens_decoder",
       {{"12", {{"content", "<late>"}, {"special", false}}}, {"9", {{"content", "<early>"}, {"special", true}}}}}};
  const Tokenizer tokenizer(kTinyJson, config, "test");
  EXPECT_EQ(tokenizer.vocab_size(), 12);
  EXPECT_THAT(tokenizer.encode("<early>a<late><end>", false), ElementsAre(9, 2, 10, 11));
  EXPECT_EQ(tokenizer.eos_id(), 11);
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
  EXPECT_EQ(tokenizer.decode({9, 2, 10, 11}, true), "a<late>");
}

TEST(Tokenizer, RefusesWhatDoesNotFit) {
  const auto open = [](std::string json, Json config) { return [=] { Tokenizer(json, config, "folder/x"); }; };
  EXPECT_THAT(open("{\"model\": ", {}),
              ThrowsMessage<FormatError>(HasSubstr("folder/x: tokenizer.json is not usable")));
  EXPECT_THAT(open("", {}), ThrowsMessage<FormatError>(HasSubstr("not usable")));
  EXPECT_THAT(open(std::string(100000, '['), {}), ThrowsMessage<FormatError>(HasSubstr("not usable")));
  EXPECT_THAT(open(kTinyJson, {{"bos_token", 7}}), ThrowsMessage<FormatError>(HasSubstr("bos_token is 7")));
  EXPECT_THAT(open(kTinyJson, {{"added_tokens_decoder", {{"x", {{"content", "a"}}}}}}),
              ThrowsMessage<FormatError>(HasSubstr("added_tokens_decoder['x']")));

  const auto tokenizer = tiny_tokenizer();
  EXPECT_THAT([&] { tokenizer->encode("ab\xC3", false); },
              ThrowsMessage<DataError>(HasSubstr("not valid UTF-8 at byte 2")));
  EXPECT_THAT([&] { tokenizer->decode({2, -1}, false); }, ThrowsMessage<DataError>(HasSubstr("id -1 at position 1")));
}

TEST(StreamDecoder, HoldsHalfACharacterBack) {
  StreamDecoder stream(tiny_tokenizer());
  EXPECT_EQ(stream.push(7), "ab");
  EXPECT_EQ(stream.push(5), "");
  EXPECT_EQ(stream.push(6), "\xC3\xA9");
  EXPECT_EQ(stream.push(0), "");  // special tokens are skipped
  EXPECT_EQ(stream.push(3), "b");
  EXPECT_EQ(stream.push(5), "");
  EXPECT_EQ(stream.finish(), "\xEF\xBF\xBD");  // the other half never came
  EXPECT_EQ(stream.push(3), "b");
}

TEST(StreamDecoder, KeepsTheBlankThatADecoderStripsFromTheFirstToken) {
  const auto tokenizer = std::make_shared<Tokenizer>(
      R"({"version": "1.0", "added_tokens": [],
          "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
          "model": {"type": "WordLevel", "vocab": {"▁a": 0, "▁b": 1}, "unk_token": "▁a"}})",
      Json::object(), "metaspace");
  StreamDecoder stream(tokenizer);
  EXPECT_EQ(stream.push(0), "a");
  EXPECT_EQ(stream.push(1), " b");
  EXPECT_EQ(stream.push(1), " b");
}

TEST(StreamDecoder, DoesNotWaitForeverForBytesThatAreNoCharacter) {
  StreamDecoder stream(tiny_tokenizer());
  std::string text;
  for (int i = 0; i < 40; ++i) text += stream.push(6);
  EXPECT_THAT(text, HasSubstr("\xEF\xBF\xBD"));
}

TEST(LossMask, TrainsTokensWhoseLastByteLiesInARange) {
  // ranges   ....[2    6)..[8 9)
  const RenderedChat chat{"0123456789", {{2, 6}, {8, 9}}};
  const Encoding encoding{{1, 2, 3, 4, 5, 6, 7, 8}, {{0, 0}, {0, 2}, {1, 3}, {3, 6}, {3, 7}, {6, 8}, {7, 9}, {9, 10}}};
  EXPECT_THAT(loss_mask(encoding, chat), ElementsAre(0, 0, 1, 1, 0, 0, 1, 0));
  EXPECT_THAT(loss_mask({{1, 2}, {{2, 2}, {4, 4}}}, chat), ElementsAre(0, 0));  // nothing of the text
}

}  // namespace
}  // namespace moesaic::tokenizer
