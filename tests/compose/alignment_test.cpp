#include "moesaic/compose/alignment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/models/registry.h"
#include "tests/compose/tokenizers.h"

namespace moesaic::compose {
namespace {

using test::complete_texts;
using test::golden_tokenizer;
using ::testing::ElementsAre;
using tokenizer::Tokenizer;
using Ids = std::vector<int64_t>;
using TokenizerPtr = std::shared_ptr<const Tokenizer>;

std::shared_ptr<const Alignment> alignment(TokenizerPtr anchor, TokenizerPtr augmenting,
                                           const std::string& rule = "word", const std::string& policy = "causal") {
  return std::make_shared<Alignment>(std::move(anchor), std::move(augmenting), rule, policy);
}

/// What a sequence commits, step by step.
struct Reading {
  Ids ids;
  Ids counts;  // c(t)
};
Reading read(std::shared_ptr<const Alignment> how, const Ids& anchor_ids, const std::vector<size_t>& borders = {}) {
  Aligner aligner(std::move(how));
  Reading reading;
  for (size_t i = 0; i < anchor_ids.size(); ++i) {
    const bool border = std::find(borders.begin(), borders.end(), i + 1) != borders.end();
    for (const int64_t id : aligner.push(anchor_ids[i], border)) reading.ids.push_back(id);
    reading.counts.push_back(aligner.committed());
  }
  return reading;
}

/// Random text out of pieces that meet badly.
std::string random_text(uint64_t seed) {
  static const std::vector<std::string> pieces{"un", "til", " ",      "  ",  "\n", "'ll",  "123",
                                               "é",  "ß",   "ий",     "人",  "รุ่ง", "👍🏽", "👨‍👩‍👧",
                                               ".",  ", ",  " tomor", "row", "\t", "🇨🇭",   "x"};
  std::mt19937_64 random(seed);
  std::string text;
  for (size_t i = 0, n = 1 + random() % 24; i < n; ++i) text += pieces[random() % pieces.size()];
  return text;
}

std::vector<std::string> all_texts() {
  std::vector<std::string> texts = test::hard_texts();
  for (uint64_t seed = 0; seed < 150; ++seed) texts.push_back(random_text(seed));
  return texts;
}

TEST(ClosedChunk, BlanksThenWordUntilTheNextBlank) {
  EXPECT_EQ(closed_chunk("until"), 0u);
  EXPECT_EQ(closed_chunk("until "), 5u);
  EXPECT_EQ(closed_chunk("  until\nx"), 7u);
  EXPECT_EQ(closed_chunk("   "), 0u);                       // the word behind the blanks is still to come
  EXPECT_EQ(closed_chunk("\xC2\xA0word\xE3\x80\x80"), 6u);  // no-break space, ideographic space
  EXPECT_EQ(closed_chunk(std::string(31, 'a')), 0u);
  EXPECT_EQ(closed_chunk(std::string(32, 'a')), 32u);  // cut for ever, whatever follows
  std::string thai;
  for (int i = 0; i < 40; ++i) thai += "\xE0\xB8\x81";
  EXPECT_EQ(closed_chunk(thai), 96u);  // 32 characters of 3 bytes
}

TEST(Alignment, SameTokenizerPassesIdsThrough) {
  const TokenizerPtr a = golden_tokenizer("gpt2"), b = golden_tokenizer("gpt2", "");
  EXPECT_TRUE(same_tokenizer(*a, *b));
  EXPECT_FALSE(same_tokenizer(*a, *golden_tokenizer("llama3")));
  const Ids ids{0, 17, 5, 99};
  const Reading reading = read(alignment(a, b), ids);
  EXPECT_EQ(reading.ids, ids);
  EXPECT_THAT(reading.counts, ElementsAre(1, 2, 3, 4));
}

TEST(Alignment, WordsAreCommittedOnceTheirEndIsKnown) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), aug = golden_tokenizer("llama3");
  const auto how = alignment(anchor, aug);
  // " ships" is spelt in pieces by neither or either; only its last piece and the blank behind it decide.
  const Ids text = anchor->encode("ships that", false);
  const Reading open = read(how, text);
  const Ids ships = aug->encode("ships", false), that = aug->encode(" that", false);
  Ids expected{0};  // BOS
  expected.insert(expected.end(), ships.begin(), ships.end());
  EXPECT_EQ(open.ids, expected) << "' that' may go on";
  EXPECT_EQ(open.counts.front(), 1);
  expected.insert(expected.end(), that.begin(), that.end());
  EXPECT_EQ(read(how, text, {text.size()}).ids, expected) << "the prompt ends here";
  Ids closed = text;
  closed.push_back(1);  // </s>, a special token: a border without text
  EXPECT_EQ(read(how, closed).ids, expected);
  EXPECT_EQ(read(how, closed).counts.back(), std::ssize(expected));
}

TEST(Alignment, TokenRuleReadsEachAnchorTokenAtOnce) {
  const TokenizerPtr anchor = golden_tokenizer("llama3"), aug = golden_tokenizer("gpt2");
  const Ids ids = anchor->encode("The keeper", false);
  const Reading reading = read(alignment(anchor, aug, "token"), ids);
  Ids expected{0};
  for (size_t i = 0; i < ids.size(); ++i) {
    for (const int64_t id : aug->encode(anchor->decode({ids[i]}, true), false)) expected.push_back(id);
    EXPECT_EQ(reading.counts[i], std::ssize(Ids(expected))) << i;
  }
  EXPECT_EQ(reading.ids, expected);
}

TEST(Alignment, MixedRuleReadsWordsUpToTheFirstBorderAndTokensBehindIt) {
  const TokenizerPtr anchor = golden_tokenizer("llama3"), aug = golden_tokenizer("gpt2");
  const Ids prompt = anchor->encode("The keeper wrote", false), answer = anchor->encode(" until dawn", false);
  Ids ids = prompt;
  ids.insert(ids.end(), answer.begin(), answer.end());
  const std::vector<size_t> borders{prompt.size(), prompt.size() + 1};
  const Reading mixed = read(alignment(anchor, aug, "mixed"), ids, borders);
  const Reading words = read(alignment(anchor, aug, "word"), prompt, borders);
  EXPECT_EQ(Ids(mixed.counts.begin(), mixed.counts.begin() + std::ssize(prompt)), words.counts);
  Ids expected = words.ids;
  for (size_t i = 0; i < answer.size(); ++i) {
    for (const int64_t id : aug->encode(anchor->decode({answer[i]}, true), false)) expected.push_back(id);
    EXPECT_EQ(mixed.counts[prompt.size() + i], std::ssize(expected)) << "nothing waits for a blank";
  }
  EXPECT_EQ(mixed.ids, expected);
}

TEST(Alignment, HalfACharacterCommitsNothing) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), aug = golden_tokenizer("llama3");
  const Ids ids = anchor->encode("👍", false);
  ASSERT_EQ(ids.size(), 4u) << "one token per byte";
  const Reading reading = read(alignment(anchor, aug, "token"), ids);
  EXPECT_THAT(reading.counts, ElementsAre(1, 1, 1, 1 + std::ssize(aug->encode("👍", false))));
}

TEST(Alignment, PrefixPolicyReadsThePromptOnly) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), aug = golden_tokenizer("llama3");
  const Ids ids = anchor->encode("The ships passed before dawn", false);
  for (const auto& [a, b] : {std::pair(anchor, aug), std::pair(anchor, anchor)}) {
    const Reading causal = read(alignment(a, b), ids, {9}), prefix = read(alignment(a, b, "word", "prefix"), ids, {9});
    for (size_t t = 0; t < ids.size(); ++t) EXPECT_EQ(prefix.counts[t], causal.counts[std::min<size_t>(t, 8)]) << t;
    EXPECT_LT(prefix.ids.size(), causal.ids.size());
  }
}

TEST(Alignment, BlankInFrontComesOnceOnly) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), aug = golden_tokenizer("llama2");
  const Reading reading = read(alignment(anchor, aug), anchor->encode("the long book", false), {100});
  Ids closed = anchor->encode("the long book", false);
  const Reading all = read(alignment(anchor, aug), closed, {closed.size()});
  EXPECT_EQ(aug->decode(all.ids, true), "the long book");
  EXPECT_LT(reading.ids.size(), all.ids.size());
}

TEST(Alignment, BadWordsAreSaid) {
  EXPECT_THROW(Alignment(nullptr, nullptr, "words", "causal"), ConfigError);
  EXPECT_THROW(Alignment(nullptr, nullptr, "word", "none"), ConfigError);
  EXPECT_THROW(Alignment(golden_tokenizer("gpt2"), nullptr, "word", "causal"), ConfigError);
}

/// The law of the commit rule, for every pair of tokenizers: what is committed at a position is the reading of the text
/// known there. Two anchors that spell the text differently must agree wherever they know the same text.
TEST(AlignmentLaw, CommittedIdsAreAFunctionOfTheKnownText) {
  const std::vector<std::string> anchors{"gpt2", "llama3", "llama2"}, augs{"gpt2", "llama3", "llama2", "unigram"};
  for (const std::string& name : augs) {
    const TokenizerPtr aug = golden_tokenizer(name);
    for (const std::string& text : all_texts()) {
      std::map<std::string, Ids> by_text;  // known text -> committed ids
      int64_t compared = 0;
      for (const std::string& anchor_name : anchors) {
        if (anchor_name == name) continue;
        const TokenizerPtr anchor = golden_tokenizer(anchor_name);
        const Ids ids = anchor->encode(text, false);
        const Reading reading = read(alignment(anchor, aug), ids);
        const auto known = complete_texts(anchor, ids);
        for (size_t t = 0; t < ids.size(); ++t) {
          ASSERT_LE(reading.counts[t], std::ssize(reading.ids));
          if (t > 0) ASSERT_GE(reading.counts[t], reading.counts[t - 1]);
          const Ids committed(reading.ids.begin(), reading.ids.begin() + reading.counts[t]);
          const auto [place, fresh] = by_text.emplace(known[t], committed);
          compared += !fresh;
          EXPECT_EQ(place->second, committed) << anchor_name << " -> " << name << " after '" << known[t] << "'";
        }
      }
      EXPECT_GT(compared, 0) << text;
    }
  }
}

TEST(AlignmentLaw, NothingBehindTheKnownTextIsRead) {
  for (const char* rule : {"word", "token", "mixed"}) {
    for (const auto& [anchor_name, aug_name] : {std::pair("gpt2", "llama3"), std::pair("llama3", "gpt2"),
                                                std::pair("llama2", "gpt2"), std::pair("llama3", "llama2")}) {
      const TokenizerPtr anchor = golden_tokenizer(anchor_name), aug = golden_tokenizer(aug_name);
      const auto how = alignment(anchor, aug, rule);
      for (const std::string& text : all_texts()) {
        const Ids ids = anchor->encode(text, false);
        const Reading reading = read(how, ids, {ids.size() / 2});
        const auto known = complete_texts(anchor, ids);
        for (size_t t = 0; t < ids.size(); ++t) {
          const Ids committed(reading.ids.begin(), reading.ids.begin() + reading.counts[t]);
          const std::string seen = aug->decode(committed, /*skip_special_tokens=*/true);
          EXPECT_TRUE(known[t].starts_with(seen)) << rule << " '" << seen << "' of '" << known[t] << "'";
          if (std::string(rule) == "token") EXPECT_EQ(known[t], seen);
        }
      }
    }
  }
}

/// Byte-level tokenizers cut a text at the same places as chunks do, so nothing about their reading is unusual.
TEST(AlignmentLaw, WordRuleIsCanonicalForByteLevelTokenizers) {
  for (const auto& [anchor_name, aug_name] : {std::pair("gpt2", "llama3"), std::pair("llama3", "gpt2")}) {
    const TokenizerPtr anchor = golden_tokenizer(anchor_name), aug = golden_tokenizer(aug_name);
    for (const char* text : {"The keeper wrote until tomorrow, and nobody'll ask.", "Möwen über den Dächern: élèves",
                             "In 1984 there were 365 entries, it cost $3.50", "смотритель маяка считал корабли"}) {
      const Ids ids = anchor->encode(text, false);
      Ids expected{0};
      for (const int64_t id : aug->encode(text, false)) expected.push_back(id);
      EXPECT_EQ(read(alignment(anchor, aug), ids, {ids.size()}).ids, expected) << text;
    }
  }
}

TEST(Aligner, TruncateGoesBackExactly) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), aug = golden_tokenizer("llama3");
  const auto how = alignment(anchor, aug);
  for (const std::string& text : test::hard_texts()) {
    const Ids ids = anchor->encode(text, false);
    const size_t border = ids.size() / 2 + 1;
    const Reading expected = read(how, ids, {border});
    for (size_t kept = 0; kept <= ids.size(); kept += 3) {
      Aligner aligner(how);
      for (size_t i = 0; i < ids.size(); ++i) aligner.push(ids[i], i + 1 == border);
      aligner.truncate(static_cast<int64_t>(kept));
      EXPECT_EQ(aligner.tokens(), std::ssize(Ids(ids.begin(), ids.begin() + kept)));
      Ids again(expected.ids.begin(), expected.ids.begin() + aligner.committed());
      for (size_t i = kept; i < ids.size(); ++i) {
        for (const int64_t id : aligner.push(ids[i], i + 1 == border)) again.push_back(id);
        EXPECT_EQ(aligner.committed(), expected.counts[i]);
      }
      EXPECT_EQ(again, expected.ids);
    }
  }
}

/// A real tokenizer reads what the small ones spell.
TEST(AlignmentLaw, SmolLM2) {
  const std::filesystem::path path =
      std::filesystem::path(MOESAIC_SOURCE_DIR) / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "the model of `make demo` is not there";
  const TokenizerPtr smol = Tokenizer::open(*models::open_checkpoint(path));
  for (const auto& [anchor, aug] :
       {std::pair<TokenizerPtr, TokenizerPtr>(smol, golden_tokenizer("llama3")), {golden_tokenizer("gpt2"), smol}}) {
    const auto how = alignment(anchor, aug);
    for (const std::string& text : all_texts()) {
      const Ids ids = anchor->encode(text, false);
      const Reading reading = read(how, ids, {ids.size()});
      const Ids begun(reading.ids.begin() + 1, reading.ids.end());  // without BOS
      EXPECT_EQ(aug->decode(begun, /*skip_special_tokens=*/true), text);
    }
  }
}

// --- an encoder's reading --------------------------------------------------------------------------------------------

std::shared_ptr<const Alignment> encoder_alignment(TokenizerPtr anchor, TokenizerPtr encoder) {
  return std::make_shared<Alignment>(std::move(anchor), std::move(encoder), "word", "prefix", /*ahead=*/true);
}

TEST(EncoderAlignment, ThePromptIsCommittedAtItsBorderAndNothingElse) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), encoder = test::encoder_tokenizer();
  const auto how = encoder_alignment(anchor, encoder);
  for (const std::string& text : all_texts()) {
    const Ids prompt = anchor->encode(text, false);
    if (prompt.empty()) continue;
    Ids ids = prompt;
    for (const int64_t id : anchor->encode(" an answer, long and other", false)) ids.push_back(id);
    const Reading reading = read(how, ids, {prompt.size(), prompt.size() + 2});
    EXPECT_EQ(reading.ids, encoder->encode(text, true)) << text;  // in one piece, EOS behind
    for (size_t t = 0; t < ids.size(); ++t) {
      EXPECT_EQ(reading.counts[t], t + 1 < prompt.size() ? 0 : std::ssize(reading.ids)) << text << ' ' << t;
    }
    // Each stands where its text ends.
    Aligner aligner(how);
    for (size_t t = 0; t < prompt.size(); ++t) aligner.push(prompt[t], t + 1 == prompt.size());
    const auto offsets = encoder->encode_with_offsets(text, true).offsets;
    const auto texts = complete_texts(anchor, prompt);
    ASSERT_EQ(aligner.places().size(), offsets.size());
    for (size_t i = 0; i < offsets.size(); ++i) {
      size_t place = 0;
      while (texts[place].size() < offsets[i].second) ++place;
      if (offsets[i].first == offsets[i].second) place = prompt.size() - 1;
      EXPECT_EQ(aligner.places()[i], static_cast<int64_t>(place)) << text << ' ' << i;
    }
  }
}

TEST(EncoderAlignment, SpecialTokensPartWords) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), encoder = test::encoder_tokenizer();
  Ids ids{0};  // <s>
  for (const int64_t id : anchor->encode("until", false)) ids.push_back(id);
  ids.push_back(1);  // </s>
  for (const int64_t id : anchor->encode("tomorrow", false)) ids.push_back(id);
  const Reading reading = read(encoder_alignment(anchor, encoder), ids, {ids.size()});
  EXPECT_EQ(reading.ids, encoder->encode("until tomorrow", true));
  EXPECT_EQ(std::count(reading.counts.begin(), reading.counts.end(), 0), std::ssize(ids) - 1)
      << "not before the border";
  EXPECT_EQ(read(encoder_alignment(anchor, encoder), {0}, {1}).ids, encoder->encode("", true));  // a prompt of no text
  EXPECT_TRUE(read(encoder_alignment(anchor, encoder), ids).ids.empty()) << "no prompt ends";
}

TEST(EncoderAlignment, CutAndGoneOn) {
  const TokenizerPtr anchor = golden_tokenizer("gpt2"), encoder = test::encoder_tokenizer();
  const Ids ids = anchor->encode("The keeper wrote until tomorrow", false);
  Aligner aligner(encoder_alignment(anchor, encoder));
  for (const int64_t id : ids) aligner.push(id, false);
  EXPECT_EQ(aligner.committed(), 0);
  aligner.truncate(2);
  const Ids read = aligner.push(ids[2], true);
  EXPECT_EQ(read, encoder->encode(anchor->decode({ids[0], ids[1], ids[2]}, true), true));
  EXPECT_TRUE(aligner.push(ids[3], true).empty());
  aligner.truncate(3);
  EXPECT_EQ(aligner.committed(), std::ssize(read));
  aligner.truncate(2);
  EXPECT_EQ(aligner.committed(), 0);
}

TEST(EncoderAlignment, PassedIdsWaitForTheBorder) {
  const auto how = std::make_shared<Alignment>(nullptr, nullptr, "word", "prefix", true);
  const Reading reading = read(how, {7, 8, 9, 7}, {3});
  EXPECT_THAT(reading.ids, ElementsAre(7, 8, 9));
  EXPECT_THAT(reading.counts, ElementsAre(0, 0, 3, 3));
  EXPECT_THROW(Alignment(nullptr, nullptr, "word", "causal", true), ConfigError);
}

}  // namespace
}  // namespace moesaic::compose
