#include "moesaic/formats/sentencepiece.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::raw;

/// Fields of a protocol buffer: a tag (number * 8 + wire type) and its value.
std::string number(int field, uint8_t value) {
  const auto tag = static_cast<uint8_t>(field * 8 % 128);
  const bool two_bytes = field * 8 > 127;
  return (two_bytes ? raw<uint8_t>(tag | 0x80) + raw<uint8_t>(field * 8 / 128) : raw(tag)) + raw(value);
}
std::string chunk(int field, const std::string& bytes) {
  return raw<uint8_t>(field * 8 + 2) + raw(static_cast<uint8_t>(bytes.size())) + bytes;
}
std::string piece(const std::string& text, float score, uint8_t type) {
  return chunk(1, chunk(1, text) + raw<uint8_t>(2 * 8 + 5) + raw(score) + number(3, type));
}

const std::string kSpecial = piece("<pad>", 0, 3) + piece("</s>", 0, 3) + piece("<unk>", 0, 2);
const std::string kTrainer = chunk(2, number(3, 1) + number(40, 2));

std::string json_of(const std::string& bytes, int64_t extra_ids = 2) {
  return sentencepiece_tokenizer_json(Bytes::from_string(bytes, "spiece.model"), extra_ids);
}

TEST(Sentencepiece, PiecesBecomeTokenizerJson) {
  // "Mg==" is base64 of "2"; unknown fields (here 9) are passed over.
  const Json json = Json::parse(json_of(kSpecial + piece("a", -1.5, 1) + piece("<u>", 0, 4) + kTrainer +
                                        chunk(3, chunk(2, "2")) + chunk(9, "x")));
  EXPECT_EQ(json["model"]["vocab"],
            Json::parse(R"([["<pad>",0.0],["</s>",0.0],["<unk>",0.0],["a",-1.5],["<u>",0.0],["<extra_id_1>",0.0],
                            ["<extra_id_0>",0.0]])"));
  EXPECT_EQ(json["model"]["unk_id"], 2);
  EXPECT_EQ(json["normalizer"]["precompiled_charsmap"], "Mg==");
  EXPECT_EQ(json["post_processor"]["special_tokens"]["</s>"]["ids"], Json::parse("[1]"));
  std::vector<std::pair<int, bool>> added;
  for (const Json& token : json["added_tokens"]) added.emplace_back(token["id"], token["special"]);
  using testing::Pair;
  EXPECT_THAT(added, testing::ElementsAre(Pair(0, true), Pair(1, true), Pair(2, true), Pair(4, false), Pair(5, true),
                                          Pair(6, true)));
  EXPECT_EQ(Json::parse(json_of(kSpecial + kTrainer))["normalizer"], nullptr);
}

TEST(Sentencepiece, Base64) {
  auto charsmap = [](const std::string& bytes) {
    return Json::parse(json_of(kSpecial + kTrainer + chunk(3, chunk(2, bytes))))["normalizer"]["precompiled_charsmap"];
  };
  EXPECT_EQ(charsmap("\xff"), "/w==");
  EXPECT_EQ(charsmap("\xff\xfe"), "//4=");
  EXPECT_EQ(charsmap(std::string("\x00\x10\x83", 3)), "ABCD");
}

TEST(Sentencepiece, WhatIsNotT5sIsRefused) {
  EXPECT_ERROR(json_of(kSpecial + chunk(2, number(3, 2) + number(40, 2))), DataError, "kind 2", "save_pretrained");
  EXPECT_ERROR(json_of(piece("<unk>", 0, 2)), DataError, "</s>");
}

TEST(Sentencepiece, DamageIsSaid) {
  EXPECT_ERROR(json_of(""), FormatError, "no piece");
  EXPECT_ERROR(json_of(kSpecial + chunk(2, number(40, 3))), FormatError, "the unknown piece is 3 of 3");
  EXPECT_ERROR(json_of(kSpecial + kTrainer +
                       "\x0a\x05"
                       "ab"),
               FormatError, "field 1 needs 5 bytes, but 2 are left");
  EXPECT_ERROR(json_of(kSpecial + kTrainer + "\x0b"), FormatError, "wire type 3");
  EXPECT_ERROR(json_of(kSpecial + number(2, 1)), FormatError, "field 2 has wire type 0, expected 2");
  EXPECT_ERROR(json_of(std::string(11, '\xff')), FormatError, "more than 64 bits");
  EXPECT_ERROR(json_of(kSpecial + piece("\xff", 0, 1)), FormatError, "UTF-8");
  EXPECT_ERROR(json_of(kSpecial + piece("a", std::numeric_limits<float>::quiet_NaN(), 1)), FormatError, "not finite");
  const std::string whole = kSpecial + kTrainer;
  for (size_t size = 0; size < whole.size(); ++size) {
    try {
      json_of(whole.substr(0, size));
    } catch (const DataError&) {
    }
  }
}

}  // namespace
}  // namespace moesaic::formats
