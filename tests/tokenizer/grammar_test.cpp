#include "moesaic/tokenizer/grammar.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "moesaic/base/check.h"
#include "tests/compose/tokenizers.h"

namespace moesaic::tokenizer {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

/// A byte-level BPE; <eos> ends an answer. The model has more logits than the tokenizer tokens.
struct Vocabulary {
  std::shared_ptr<Tokenizer> tokenizer = Tokenizer::train(
      {R"({"name": "Ada", "age": 36, "tags": ["a", "b"], "height": 1.5})", "yes no maybe", "M\xC3\xB6wen"}, 300);
  int64_t size = tokenizer->vocab_size() + 7;
  Grammars grammars{tokenizer, {*tokenizer->eos_id()}, size};
};

/// A text of the grammar by random logits; at most `most` tokens. `ended`: it can't go on, or its end was drawn.
std::string drawn(const Vocabulary& vocabulary, const Grammar& start, uint64_t seed, bool& ended, int64_t most = 400) {
  const auto grammar = start.fork();
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<int64_t> ids;
  ended = false;
  while (std::ssize(ids) < most && !ended) {
    std::vector<float> logits(vocabulary.size);
    for (float& z : logits) z = normal(random);
    grammar->mask(logits);
    const int64_t token = std::max_element(logits.begin(), logits.end()) - logits.begin();
    EXPECT_TRUE(std::isfinite(logits[token]));
    if (token == *vocabulary.tokenizer->eos_id()) {
      ended = true;
      break;
    }
    grammar->take(token);
    ids.push_back(token);
    ended = grammar->ended();
  }
  return vocabulary.tokenizer->decode(ids, true);
}

TEST(Grammars, EveryTextOfASchemaIsOfIt) {
  const Vocabulary vocabulary;
  const auto start = vocabulary.grammars.compile("json_schema", R"({
    "type": "object", "additionalProperties": false, "required": ["kind", "age", "tags"],
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
                   "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}})");
  std::set<std::string> kinds;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    bool ended = false;
    const std::string text = drawn(vocabulary, *start, seed, ended);
    ASSERT_TRUE(ended) << text;
    const Json json = parse_json(text, "answer");
    EXPECT_EQ(json.size(), 3U) << text;
    kinds.insert(json["kind"]);
    EXPECT_TRUE(json["age"].is_number_integer() && json["age"] >= 0 && json["age"] <= 99) << text;
    EXPECT_LE(json["tags"].size(), 3U);
    for (const Json& tag : json["tags"]) EXPECT_TRUE(tag.is_boolean());
  }
  EXPECT_EQ(kinds, (std::set<std::string>{"cat", "dog"}));
}

TEST(Grammars, RegexesAndLarkGrammars) {
  const Vocabulary vocabulary;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    bool ended = false;
    EXPECT_THAT(drawn(vocabulary, *vocabulary.grammars.compile("regex", "(yes|no|M\xC3\xB6wen)"), seed, ended),
                testing::AnyOf("yes", "no", "M\xC3\xB6wen"));
    EXPECT_TRUE(ended);
    const std::string sum =
        drawn(vocabulary, *vocabulary.grammars.compile("lark", "start: N (\"+\" N)*\nN: /[1-9]/"), seed, ended);
    EXPECT_THAT(sum, testing::MatchesRegex("[1-9](\\+[1-9])*"));
  }
}

TEST(Grammars, AForkGoesItsOwnWay) {
  const Vocabulary vocabulary;
  const auto start = vocabulary.grammars.compile("regex", "ab|ac");
  const auto first = start->fork();
  first->take(*vocabulary.tokenizer->token_to_id("a"));
  const auto second = first->fork();
  first->take(*vocabulary.tokenizer->token_to_id("b"));
  EXPECT_TRUE(first->ended());
  EXPECT_FALSE(second->ended());
  second->take(*vocabulary.tokenizer->token_to_id("c"));
  EXPECT_TRUE(second->ended());
  EXPECT_THROW(start->fork()->take(*vocabulary.tokenizer->token_to_id("z")), DataError);
}

TEST(Grammars, SentencePiecesWriteBlanks) {
  const auto tokenizer = test::golden_tokenizer("llama2");
  const Grammars grammars(tokenizer, {*tokenizer->token_to_id("</s>")}, tokenizer->vocab_size());
  const auto start = grammars.compile("regex", "The keeper");
  const auto grammar = start->fork();
  const std::vector<int64_t> ids = tokenizer->encode_behind("The keeper");
  std::vector<float> logits(tokenizer->vocab_size(), 0.0f);
  grammar->mask(logits);
  EXPECT_TRUE(std::isfinite(logits[ids[0]]));
  for (const int64_t id : ids) grammar->take(id);
  EXPECT_TRUE(grammar->ended());
}

TEST(Grammars, WhatIsRefused) {
  const Vocabulary vocabulary;
  auto compile = [&](const char* kind, const std::string& source) {
    return [&vocabulary, kind, source] { vocabulary.grammars.compile(kind, source); };
  };
  EXPECT_THAT(compile("json_schema", "{"), ThrowsMessage<UsageError>(HasSubstr("json_schema: the schema is no JSON")));
  EXPECT_THAT(compile("json_schema", R"({"type": "array", "uniqueItems": true})"),
              ThrowsMessage<UsageError>(HasSubstr("uniqueItems")));
  EXPECT_THAT(compile("json_schema", R"({"type": "objekt"})"), testing::Throws<UsageError>());
  EXPECT_THAT(compile("regex", "("), testing::Throws<UsageError>());
  EXPECT_THAT(compile("lark", "start: missing"), testing::Throws<UsageError>());
  std::string deep = R"({"type": "integer"})";
  for (int i = 0; i < 40; ++i) deep = R"({"type": "array", "items": )" + deep + "}";
  EXPECT_THAT(compile("json_schema", deep), ThrowsMessage<UsageError>(HasSubstr("deep, expected at most 32")));
  EXPECT_THAT(compile("regex", std::string(70'000, 'a')),
              ThrowsMessage<UsageError>(HasSubstr("expected at most 65536")));
  EXPECT_NO_THROW(compile("json_schema", R"({"type": "integer"})")());
}

}  // namespace
}  // namespace moesaic::tokenizer
