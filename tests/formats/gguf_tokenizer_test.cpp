#include "moesaic/formats/gguf_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::GgufBuilder;

/// A byte-level vocabulary: "Ġ" spells the space.
GgufBuilder byte_level(const std::string& pre) {
  GgufBuilder builder;
  builder.string("general.architecture", "llama")
      .string("tokenizer.ggml.model", "gpt2")
      .strings("tokenizer.ggml.tokens", {"<|end|>", "a", "b", "ab", "Ġ", "<think>"})
      .i32s("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 4})
      .strings("tokenizer.ggml.merges", {"a b"})
      .u32("tokenizer.ggml.eos_token_id", 0);
  if (!pre.empty()) builder.string("tokenizer.ggml.pre", pre);
  return builder;
}

GgufBuilder sentencepiece(const std::string& arch) {
  GgufBuilder builder;
  builder.string("general.architecture", arch)
      .string("tokenizer.ggml.model", "llama")
      .strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab"})
      .i32s("tokenizer.ggml.token_type", {2, 3, 3, 6, 1, 1, 1, 1, 1, 1})
      .f32s("tokenizer.ggml.scores", {0, 0, 0, 0, -5, -6, -7, -2, -1, -3})
      .u32("tokenizer.ggml.bos_token_id", 1)
      .u32("tokenizer.ggml.eos_token_id", 2)
      .u32("tokenizer.ggml.unknown_token_id", 0);
  return builder;
}

Json tokenizer_of(const GgufBuilder& builder) {
  return parse_json(gguf_tokenizer_json(GgufFile(builder.bytes())).value(), "tokenizer.json");
}

TEST(GgufTokenizer, ByteLevel) {
  const Json json = tokenizer_of(byte_level("gpt-2"));
  EXPECT_EQ(json["model"]["type"], "BPE");
  EXPECT_EQ(json["model"]["vocab"], parse_json(R"({"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "<think>": 5})", ""));
  EXPECT_EQ(json["model"]["merges"], parse_json(R"([["a", "b"]])", ""));
  EXPECT_EQ(json["model"]["byte_fallback"], false);
  EXPECT_EQ(json["pre_tokenizer"]["type"], "ByteLevel");
  EXPECT_EQ(json["pre_tokenizer"]["use_regex"], true);
  EXPECT_EQ(json["decoder"]["type"], "ByteLevel");
  EXPECT_TRUE(json["post_processor"].is_null());
  ASSERT_EQ(json["added_tokens"].size(), 2u);
  EXPECT_EQ(json["added_tokens"][0], parse_json(R"({"id": 0, "content": "<|end|>", "single_word": false,
      "lstrip": false, "rstrip": false, "normalized": false, "special": true})",
                                                ""));
  EXPECT_EQ(json["added_tokens"][1]["content"], "<think>");
  EXPECT_EQ(json["added_tokens"][1]["special"], false);
}

TEST(GgufTokenizer, PreTokenizers) {
  const auto parts = [](const char* pre) {
    const Json json = tokenizer_of(byte_level(pre))["pre_tokenizer"];
    std::vector<std::string> types;
    for (const auto& part : json["pretokenizers"]) types.push_back(part["type"]);
    return types;
  };
  EXPECT_THAT(parts("smollm"), testing::ElementsAre("Digits", "ByteLevel"));
  EXPECT_THAT(parts("llama-bpe"), testing::ElementsAre("Split", "ByteLevel"));
  EXPECT_THAT(parts("qwen2"), testing::ElementsAre("Split", "ByteLevel"));
  EXPECT_THAT(parts("deepseek-v3"), testing::ElementsAre("Split", "Split", "Split", "ByteLevel"));
  EXPECT_EQ(tokenizer_of(byte_level("smollm"))["pre_tokenizer"]["pretokenizers"][1]["use_regex"], true);
  EXPECT_EQ(tokenizer_of(byte_level("qwen2"))["pre_tokenizer"]["pretokenizers"][1]["use_regex"], false);
  EXPECT_EQ(tokenizer_of(byte_level("qwen2"))["normalizer"]["type"], "NFC");
  EXPECT_EQ(tokenizer_of(byte_level("llama-bpe"))["model"]["ignore_merges"], true);
  EXPECT_EQ(tokenizer_of(byte_level(""))["pre_tokenizer"]["type"], "ByteLevel") << "an old llama file: GPT-2's";
  EXPECT_ERROR(tokenizer_of(byte_level("future")), DataError, "'future'", "smollm", "qwen2");
}

TEST(GgufTokenizer, TokensThatAreNotSpelledInBytesAreRespelled) {
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2")
      .string("tokenizer.ggml.pre", "gpt-2")
      .strings("tokenizer.ggml.tokens", {"a b", "<｜x｜>", "\n"})
      .i32s("tokenizer.ggml.token_type", {1, 3, 4});
  const Json vocab = tokenizer_of(builder)["model"]["vocab"];
  EXPECT_EQ(vocab, parse_json(R"({"aĠb": 0, "<｜x｜>": 1, "\n": 2})", "")) << "added tokens are matched as they are";
}

// Scores ▁a -1, ab -2, ▁ab -3: "▁a" first, then "ab", then both ways to make "▁ab", the longer left part first.
TEST(GgufTokenizer, SentencePieceMergesFollowTheScores) {
  const Json json = tokenizer_of(sentencepiece("llama"));
  EXPECT_EQ(json["model"]["merges"], parse_json(R"([["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "ab"]])", ""));
  EXPECT_EQ(json["model"]["byte_fallback"], true);
  EXPECT_EQ(json["model"]["unk_token"], "<unk>");
  EXPECT_EQ(json["pre_tokenizer"]["prepend_scheme"], "first");
  EXPECT_EQ(json["decoder"]["decoders"].size(), 4u);
  EXPECT_EQ(json["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>") << "BOS unless the file says no";
  EXPECT_EQ(json["post_processor"]["special_tokens"]["<s>"]["ids"], parse_json("[1]", ""));

  const Json bare = tokenizer_of(sentencepiece("llama")
                                     .boolean("tokenizer.ggml.add_space_prefix", false)
                                     .boolean("tokenizer.ggml.add_bos_token", false));
  EXPECT_EQ(bare["pre_tokenizer"]["prepend_scheme"], "never");
  EXPECT_EQ(bare["decoder"]["decoders"].size(), 3u);
  EXPECT_TRUE(bare["post_processor"].is_null());
}

// Gemma's merges follow the order of the tokens: ab (7), ▁a (8), ▁ab (9).
TEST(GgufTokenizer, GemmaMergesFollowTheVocabulary) {
  const Json json = tokenizer_of(sentencepiece("gemma3"));
  EXPECT_EQ(json["model"]["merges"], parse_json(R"([["a", "b"], ["▁", "a"], ["▁a", "b"], ["▁", "ab"]])", ""));
  EXPECT_EQ(json["normalizer"]["type"], "Replace");
  EXPECT_EQ(json["pre_tokenizer"]["behavior"], "MergedWithPrevious");
  EXPECT_EQ(json["decoder"]["decoders"].size(), 3u);
}

TEST(GgufTokenizer, ChatTemplatesHaveNames) {
  EXPECT_EQ(gguf_chat_templates(GgufFile(GgufBuilder()
                                             .string("tokenizer.chat_template", "D")
                                             .string("tokenizer.chat_template.tool_use", "T")
                                             .bytes())),
            (ChatTemplates{{"default", "D"}, {"tool_use", "T"}}));
  EXPECT_TRUE(gguf_chat_templates(GgufFile(GgufBuilder().bytes())).empty());
}

TEST(GgufTokenizer, ConfigNamesTheSpecialTokens) {
  const Json config =
      gguf_tokenizer_config(GgufFile(sentencepiece("llama").boolean("tokenizer.ggml.add_eos_token", true).bytes()));
  EXPECT_EQ(config["bos_token"], "<s>");
  EXPECT_EQ(config["eos_token"], "</s>");
  EXPECT_EQ(config["unk_token"], "<unk>");
  EXPECT_FALSE(config.contains("pad_token"));
  EXPECT_EQ(config["add_bos_token"], true);
  EXPECT_EQ(config["add_eos_token"], true);
  EXPECT_EQ(gguf_tokenizer_json(GgufFile(GgufBuilder().bytes())), std::nullopt);
}

TEST(GgufTokenizer, DamagedVocabularies) {
  const auto with = [](const char* model) {
    return GgufBuilder().string("tokenizer.ggml.model", model).string("tokenizer.ggml.pre", "gpt-2");
  };
  EXPECT_ERROR(tokenizer_of(with("bert").strings("tokenizer.ggml.tokens", {"a"})), DataError, "'bert'");
  EXPECT_ERROR(
      tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a"}).i32s("tokenizer.ggml.token_type", {1, 1})),
      FormatError, "token_type has 2 entries, expected 1");
  EXPECT_ERROR(tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a", std::string(2000, 'x')})), FormatError,
               "token 1 has 2000 bytes");
  EXPECT_ERROR(tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a"}).u32("tokenizer.ggml.bos_token_id", 7)),
               FormatError, "bos_token_id: got 7");
  EXPECT_ERROR(
      tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a"}).strings("tokenizer.ggml.merges", {"a"})),
      FormatError, "two tokens");
  EXPECT_ERROR(
      tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a"}).strings("tokenizer.ggml.merges", {"a b"})),
      FormatError, "lacks", "'b'");
  EXPECT_ERROR(tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"\xff"})), FormatError, "UTF-8");
  EXPECT_ERROR(tokenizer_of(with("llama").strings("tokenizer.ggml.tokens", {"a"})), FormatError, "scores");
  EXPECT_ERROR(
      tokenizer_of(
          with("llama").strings("tokenizer.ggml.tokens", {"a"}).f32s("tokenizer.ggml.scores", {std::nanf("")})),
      FormatError, "scores");
  // A token that stands twice keeps its last id, as in Python's dict.
  EXPECT_EQ(tokenizer_of(with("gpt2").strings("tokenizer.ggml.tokens", {"a", "a"}))["model"]["vocab"],
            parse_json(R"({"a": 1})", ""));
}

}  // namespace
}  // namespace moesaic::formats
