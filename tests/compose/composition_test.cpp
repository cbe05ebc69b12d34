#include "moesaic/compose/composition.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/compose/small_models.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::compose {
namespace {

using test::config_of;
using test::logits_of;
using test::member;
using test::randomise;
using test::relative_error;
using test::two_tokenizers;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Ids = std::vector<int64_t>;

TEST(EvenlySpaced, EndsOfEqualGroups) {
  EXPECT_THAT(evenly_spaced(4, 16, 16),
              ElementsAre(ConnectionPair{3, 3}, ConnectionPair{7, 7}, ConnectionPair{11, 11}, ConnectionPair{15, 15}));
  // ceil((m + 1) 30 / 4) - 1 = 7, 14, 22, 29;  ceil((m + 1) 7 / 4) - 1 = 1, 3, 5, 6
  EXPECT_THAT(evenly_spaced(4, 30, 7),
              ElementsAre(ConnectionPair{7, 1}, ConnectionPair{14, 3}, ConnectionPair{22, 5}, ConnectionPair{29, 6}));
  EXPECT_THAT(evenly_spaced(1, 5, 2), ElementsAre(ConnectionPair{4, 1}));
  EXPECT_THROW(evenly_spaced(3, 5, 2), ConfigError);
  EXPECT_THROW(evenly_spaced(0, 5, 2), ConfigError);
}

TEST(Composition, EverythingThatDoesNotFitIsSaidAtOnce) {
  CompositionConfig config = config_of({{{{0, 4}, {3, 0}}, "words"}, {{}, "word", "half"}}, 3);
  config.connection.norm = "front";
  const auto anchor = member("gpt2", 20, 3, 1), aug = member("llama3", 14, 4, 2);
  try {
    Composition(config, anchor, {aug, aug}, 1);
    FAIL();
  } catch (const ConfigError& error) {
    for (const char* part : {"num_heads: got 3", "norm: got 'front'", "anchor 0, aug 4", "anchor 3, aug 0", "'words'",
                             "augmenting[1].mask: got 'half'", "augmenting[1].connections: got none"}) {
      EXPECT_THAT(error.what(), HasSubstr(part));
    }
  }
}

/// With as many threads as the test asks for while it lives.
struct Threads {
  explicit Threads(int count) : before(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before); }
  int before;
};

TEST(Composition, ZeroStartIsTheAnchorBitForBit) {
  for (const int threads : {1, 2}) {
    const Threads guard(threads);
    for (const auto& [name, config] : test::tiny_configs()) {
      const auto anchor = test::random_model(config, torch::kFloat32, 1),
                 aug = test::random_model(config, torch::kFloat32, 2);
      Composition composition(config_of({{evenly_spaced(2, 2, 2)}}), {anchor, nullptr}, {{aug, nullptr}}, 3);
      const std::vector<Ids> sequences{{5, 9, 3, 50, 7, 7}, {1}, {2, 3}};
      torch::NoGradGuard no_grad;
      EXPECT_TRUE(torch::equal(logits_of(composition, sequences), test::logits_of(*anchor, sequences))) << name;
      randomise(composition);
      EXPECT_GT(relative_error(logits_of(composition, sequences), test::logits_of(*anchor, sequences)), 0.02) << name;
    }
  }
}

/// Wide models and few rows, where a product's sums depend on how many rows it has beside them.
TEST(Composition, ZeroStartIsTheAnchorBitForBitWhateverTheNumberOfRows) {
  Json config = test::small_config(400, 192, 3);
  config["intermediate_size"] = 517;
  config["head_dim"] = 48;
  const auto anchor = test::random_model(config, torch::kFloat32, 1),
             aug = test::random_model(config, torch::kFloat32, 2);
  Composition composition(config_of({{{{1, 1}, {2, 2}}}}), {anchor, nullptr}, {{aug, nullptr}}, 3);
  for (const int threads : {1, 2}) {
    const Threads guard(threads);
    for (const int64_t rows : {1, 5, 12}) {
      Ids ids(rows);
      std::iota(ids.begin(), ids.end(), 7);
      EXPECT_TRUE(torch::equal(logits_of(composition, {ids}), test::logits_of(*anchor, {ids})))
          << rows << " rows, threads: " << threads;
    }
  }
}

/// Every form that is not the paper's: from m_A's final state to the anchor's, and by recency.
CompositionConfig all_forms(const std::string& rule) {
  CompositionConfig config = config_of({{{{0, 1}, {2, kFinal}, {kFinal, 2}, {kFinal, kFinal, /*newest=*/true}}, rule}});
  config.connection.cross_position = "recency";
  config.connection.norm = "standard";
  config.connection.output_scale = 1.0;
  return config;
}

std::shared_ptr<Composition> with_all_forms(const std::string& rule) {
  return std::make_shared<Composition>(all_forms(rule), member("gpt2", 20, 3, 1),
                                       std::vector{member("llama3", 14, 4, 2)}, 7);
}

TEST(Composition, FinalStatesAreWhatHeadsRead) {
  const auto composition = with_all_forms("token");
  const std::vector<Ids> sequences{{40, 90, 91, 3}, {17, 18}};
  {
    torch::NoGradGuard no_grad;
    EXPECT_TRUE(torch::equal(logits_of(*composition, sequences),
                             test::logits_of(*composition->anchor_member().model, sequences)));
    for (auto& item : composition->named_parameters()) item.value().zero_();
    composition->named_parameters()["connections.3.proj.bias"].fill_(1.0);
    const auto hidden = [&] { return test::hidden_of(*composition, sequences); };
    const auto with = hidden();
    composition->named_parameters()["connections.3.proj.bias"].zero_();
    const auto without = hidden();
    // The bias in units of the final state, on every row.
    const auto rms = without.square().mean(1, /*keepdim=*/true).sqrt().expand({-1, 20});
    EXPECT_LT(relative_error(with - without, rms), 1e-5);
  }
  randomise(*composition);
  composition->train();
  test::hidden_of(*composition, sequences).sum().backward();
  for (const auto& item : composition->named_parameters()) {
    EXPECT_GT(item.value().grad().abs().max().item<float>(), 0.0F) << item.key();
  }
}

TEST(Composition, TrainsNothingButTheConnections) {
  const auto composition = two_tokenizers();
  const auto ids = composition->anchor_member().tokenizer->encode("The keeper wrote until tomorrow, dawn", false);
  test::hidden_of(*composition, {ids}).sum().backward();
  int64_t count = 0;
  for (const auto& item : composition->named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_GT(item.value().grad().abs().max().item<float>(), 0.0f) << item.key();
    count += item.value().numel();
  }
  EXPECT_EQ(count, 2 * (14 * 20 + 20 + 4 * 20 * 20));
  EXPECT_TRUE(composition->named_parameters().contains("connections.1.k_proj.weight"));
  for (const auto& model : {composition->anchor_member().model, composition->augmenting()[0].model}) {
    for (const auto& parameter : model->parameters()) {
      EXPECT_FALSE(parameter.requires_grad());
      EXPECT_FALSE(parameter.grad().defined());
    }
  }
}

TEST(Composition, NoGraphBelowTheLowestConnection) {
  const auto composition = two_tokenizers({{{1, 3}}});
  nn::Pass pass;
  std::vector<std::pair<int64_t, bool>> blocks;  // of the anchor and the augmenting model: whether a graph leaves them
  pass.run = [&](nn::Block& block, const torch::Tensor& h, nn::Pass& own) {
    const torch::Tensor y = block.forward(h, own);
    if (own.place == "anchor") blocks.emplace_back(block.index(), y.requires_grad());
    return y;
  };
  ASSERT_TRUE(composition->hidden({nn::RaggedBatch::from_sequences({{4, 5, 6, 7}})}, pass).requires_grad());
  EXPECT_THAT(blocks, ElementsAre(std::pair{0, false}, std::pair{1, false}, std::pair{2, true}));
}

/// Text changed at or behind byte p: no logit before the first changed anchor token moves.
TEST(Causality, EveryByteOfTheText) {
  for (const char* rule : {"word", "token", "text"}) {
    const auto composition = two_tokenizers({{{0, 1}, {2, 2}}, rule});
    const auto& anchor = *composition->anchor_member().tokenizer;
    for (const std::string text : {"The ships until dawn, nobody'll 12 ", "Möwen 👍🏽 人ไทย x"}) {
      const Ids ids = anchor.encode(text, false);
      const auto logits = logits_of(*composition, {ids});
      int64_t compared = 0;
      for (size_t byte = 0; byte < text.size(); ++byte) {
        if ((static_cast<unsigned char>(text[byte]) & 0xC0) == 0x80) continue;  // inside a character
        for (const std::string& other : {std::string("z"), std::string(" "), std::string("é")}) {
          std::string changed = text.substr(0, byte) + other;
          size_t rest = byte + 1;
          while (rest < text.size() && (static_cast<unsigned char>(text[rest]) & 0xC0) == 0x80) ++rest;
          changed += text.substr(rest);
          const Ids changed_ids = anchor.encode(changed, false);
          const int64_t same =
              std::mismatch(ids.begin(), ids.end(), changed_ids.begin(), changed_ids.end()).first - ids.begin();
          if (same == 0) continue;
          const auto changed_logits = logits_of(*composition, {changed_ids});
          EXPECT_LT(relative_error(changed_logits.slice(0, 0, same), logits.slice(0, 0, same)), 1e-5)
              << rule << " '" << changed << "'";
          compared += same;
        }
      }
      EXPECT_GT(compared, 100);
    }
  }
}

TEST(Causality, OfEveryForm) {
  const auto composition = with_all_forms("token");
  randomise(*composition);
  const auto& anchor = *composition->anchor_member().tokenizer;
  const Ids ids = anchor.encode("The ships until dawn, nobody 12", false);
  const auto logits = logits_of(*composition, {ids});
  for (size_t t = 1; t < ids.size(); ++t) {
    Ids changed = ids;
    changed[t] = anchor.encode("z", false)[0];
    const auto end = static_cast<int64_t>(t);
    EXPECT_LT(relative_error(logits_of(*composition, {changed}).slice(0, 0, end), logits.slice(0, 0, end)), 1e-5) << t;
  }
}

/// One layout: replacing tokens behind t leaves the rows up to t as they are, bit for bit.
TEST(Causality, BitForBitWithOneTokenizer) {
  Composition composition(config_of({{{{0, 1}, {2, 3}}}}), member("gpt2", 20, 3, 1), {member("gpt2", 14, 4, 2)}, 3);
  randomise(composition);
  const Ids ids{5, 300, 17, 60, 61, 62, 200};
  const auto logits = logits_of(composition, {ids});
  for (size_t t = 1; t < ids.size(); ++t) {
    Ids changed = ids;
    for (size_t i = t; i < ids.size(); ++i) changed[i] = (changed[i] + 101) % 400;
    const auto other = logits_of(composition, {changed});
    const auto end = static_cast<int64_t>(t);
    EXPECT_TRUE(torch::equal(other.slice(0, 0, end), logits.slice(0, 0, end))) << t;
    EXPECT_FALSE(torch::equal(other[end], logits[end])) << t;
  }
}

TEST(Causality, FullMaskSeesTheFutureAndIsRefusedForDecoding) {
  Composition composition(config_of({{{{0, 1}, {2, 3}}, "word", "full"}}), member("gpt2", 20, 3, 1),
                          {member("gpt2", 14, 4, 2)}, 3);
  randomise(composition);
  const auto a = logits_of(composition, {{5, 6, 7, 8}}), b = logits_of(composition, {{5, 6, 7, 9}});
  EXPECT_GT(relative_error(a[0], b[0]), 1e-3);
  const auto memory = composition.memory(1);
  EXPECT_THROW(logits_of(composition, {{5, 6}}, {}, memory.get()), UsageError);
}

/// Teacher-forced pass against prefill and single tokens, sequences of several lengths together.
void expect_incremental_equals_full(Composition& composition, const std::vector<Ids>& sequences,
                                    const std::vector<int64_t>& prompts) {
  nn::Borders borders;
  for (const int64_t prompt : prompts) borders.push_back({prompt});
  const auto full = logits_of(composition, sequences, borders);
  std::vector<int64_t> starts{0}, done(sequences.size(), 0), live(sequences.size());
  for (const Ids& ids : sequences) starts.push_back(starts.back() + std::ssize(ids));
  std::iota(live.begin(), live.end(), 0);
  const auto memory = composition.memory(std::ssize(sequences));
  while (!live.empty()) {
    std::vector<Ids> next;
    nn::Borders next_borders;
    for (const int64_t b : live) {
      const int64_t count = done[b] == 0 ? prompts[b] : 1;
      next.emplace_back(sequences[b].begin() + done[b], sequences[b].begin() + done[b] + count);
      next_borders.push_back({prompts[b]});
    }
    const auto logits = logits_of(composition, next, next_borders, memory.get());
    std::vector<int64_t> kept, places;
    int64_t row = 0;
    for (size_t i = 0; i < live.size(); ++i) {
      const int64_t b = live[i], count = std::ssize(next[i]);
      EXPECT_LT(relative_error(logits.slice(0, row, row + count),
                               full.slice(0, starts[b] + done[b], starts[b] + done[b] + count)),
                2e-5)
          << "sequence " << b << ", token " << done[b];
      row += count;
      done[b] += count;
      if (done[b] == std::ssize(sequences[b])) continue;
      kept.push_back(b);
      places.push_back(static_cast<int64_t>(i));
    }
    if (places.size() < live.size() && !places.empty()) memory->keep(places);
    live = kept;
  }
}

std::vector<Ids> encoded(const Composition& composition, const std::vector<std::string>& texts) {
  std::vector<Ids> sequences;
  for (const std::string& text : texts) {
    sequences.push_back(composition.anchor_member().tokenizer->encode(text, false));
  }
  return sequences;
}

const std::vector<std::string> kTexts{"The keeper wrote until tomorrow", "x",
                                      "👍🏽 family 👨‍👩‍👧‍👦 end", "คนเฝ้าประภาคาร นับเรือ"};

TEST(Incremental, EqualsTheFullPass) {
  for (const char* rule : {"word", "token", "text"}) {
    for (const char* mask : {"causal", "prefix"}) {
      const auto composition = two_tokenizers({{{0, 1}, {2, 2}}, rule, mask});
      const auto sequences = encoded(*composition, kTexts);
      expect_incremental_equals_full(*composition, sequences, {3, 1, 1, 5});
    }
  }
}

TEST(Incremental, EqualsTheFullPassInEveryForm) {
  for (const char* rule : {"word", "token", "text"}) {
    const auto composition = with_all_forms(rule);
    randomise(*composition);
    expect_incremental_equals_full(*composition, encoded(*composition, kTexts), {3, 1, 1, 5});
  }
}

TEST(Incremental, EqualsTheFullPassWithOneTokenizer) {
  Composition composition(config_of({{{{0, 1}, {2, 3}}}}), member("gpt2", 20, 3, 1), {member("gpt2", 14, 4, 2)}, 3);
  randomise(composition);
  expect_incremental_equals_full(composition, encoded(composition, kTexts), {3, 1, 1, 5});
}

TEST(Incremental, EqualsTheFullPassWithTwoAugmentingModels) {
  Composition composition(config_of({{{{-1, 0}, {1, 3}}}, {{{1, 1}, {2, -1}}, "token"}}, 4), member("gpt2", 24, 3, 1),
                          {member("llama3", 14, 4, 2), member("llama2", 10, 2, 3)}, 3);
  randomise(composition);
  expect_incremental_equals_full(composition, encoded(composition, kTexts), {3, 1, 1, 5});
}

/// Without BOS and EOS a sequence begins with nothing to see.
TEST(Incremental, EqualsTheFullPassWhereNothingIsSeenAtFirst) {
  const auto composition = two_tokenizers({{{0, 1}, {2, 2}}}, "");
  const auto sequences = encoded(*composition, kTexts);
  const auto batch = nn::RaggedBatch::from_sequences(sequences);
  ASSERT_EQ(composition->align(batch, {})[0].seen.visible[0], 0);
  expect_incremental_equals_full(*composition, sequences, {3, 1, 1, 5});
  torch::NoGradGuard no_grad;
  const auto logits = logits_of(*composition, sequences);
  EXPECT_TRUE(torch::equal(logits[0], test::logits_of(*composition->anchor_member().model, sequences)[0]))
      << "the anchor alone";
}

TEST(Incremental, TruncateGoesBackExactly) {
  for (const char* rule : {"word", "text"}) {
    const auto composition = two_tokenizers({{{0, 1}, {2, 2}}, rule});
    const Ids ids = encoded(*composition, {"The keeper wrote 👍🏽 until tomorrow"})[0];
    const auto full = logits_of(*composition, {ids}, {{4}});
    for (const size_t kept : {0, 2, 4, 9}) {
      const auto memory = composition->memory(1);
      Ids other(ids.begin(), ids.begin() + static_cast<int64_t>(kept));
      for (int64_t i = 0; i < 6; ++i) other.push_back(100 + i);
      logits_of(*composition, {other}, {{4}}, memory.get());
      memory->truncate(0, static_cast<int64_t>(kept));
      const auto rest =
          logits_of(*composition, {Ids(ids.begin() + static_cast<int64_t>(kept), ids.end())}, {{4}}, memory.get());
      EXPECT_LT(relative_error(rest, full.slice(0, static_cast<int64_t>(kept))), 2e-5) << kept;
    }
  }
}

TEST(Incremental, RepeatedSequencesShareNothing) {
  const auto composition = two_tokenizers();
  const auto sequences = encoded(*composition, {"The keeper", "until dawn"});
  const auto memory = composition->memory(2), other = composition->memory(2);
  logits_of(*composition, sequences, {}, memory.get());
  logits_of(*composition, sequences, {}, other.get());
  memory->keep({1, 1});
  const auto a = logits_of(*composition, {{70, 71}, {90, 91}}, {}, memory.get());
  other->keep({1});
  const auto b = logits_of(*composition, {{70, 71}}, {}, other.get());
  EXPECT_LT(relative_error(a.slice(0, 0, 2), b), 1e-5);
}

TEST(Incremental, SequencesJoinARunningBatch) {
  const auto composition = two_tokenizers();
  const auto sequences = encoded(*composition, {"The keeper wrote", "until dawn", "x"});
  const auto memory = composition->memory(2);
  logits_of(*composition, {sequences[0], sequences[1]}, {}, memory.get());
  memory->keep({1});
  memory->add(1);
  EXPECT_EQ(memory->sequences(), 2);
  EXPECT_EQ(memory->length(1), 0);
  const auto together = logits_of(*composition, {{70}, sequences[2]}, {}, memory.get());
  const auto alone = logits_of(*composition, {sequences[2]});
  EXPECT_LT(relative_error(together.slice(0, 1), alone), 2e-5);
  Ids longer = sequences[1];
  longer.push_back(70);
  const auto whole = logits_of(*composition, {longer});
  EXPECT_LT(relative_error(together.slice(0, 0, 1), whole.slice(0, whole.size(0) - 1)), 2e-5);
}

/// Sequences join, wait, go back and leave; each is then where it would be alone.
TEST(Incremental, ARunningBatchEqualsOneByOne) {
  for (const char* rule : {"word", "text"}) {
    const auto composition = two_tokenizers({{{0, 1}, {2, 2}}, rule});
    const auto sequences = encoded(*composition, kTexts);
    const auto memory = composition->memory(1);
    std::vector<Ids> running{sequences[3]};
    logits_of(*composition, running, {}, memory.get());
    memory->add(2);
    // The first one waits: a text may bring it no token.
    nn::RaggedBatch joining = nn::RaggedBatch::from_sequences({sequences[2], sequences[0]});
    joining.offsets.insert(joining.offsets.begin(), 0);
    {
      torch::NoGradGuard no_grad;
      nn::Pass pass;
      composition->hidden({joining}, pass, memory.get());
    }
    running.push_back(sequences[2]);
    running.push_back(sequences[0]);
    memory->truncate(2, 5);
    running[2].resize(5);
    memory->keep({2, 0});
    running = {running[2], running[0]};
    const auto next = encoded(*composition, {" old long until dawn", "x"});
    const auto together = logits_of(*composition, next, {}, memory.get());
    int64_t row = 0;
    for (size_t b = 0; b < running.size(); ++b) {
      running[b].insert(running[b].end(), next[b].begin(), next[b].end());
      EXPECT_EQ(memory->length(static_cast<int64_t>(b)), std::ssize(running[b]));
      const int64_t end = row + std::ssize(next[b]);
      const auto alone = logits_of(*composition, {running[b]});
      EXPECT_LT(relative_error(together.slice(0, row, end), alone.slice(0, alone.size(0) - std::ssize(next[b]))), 2e-5)
          << b;
      row = end;
    }
  }
}

TEST(Composition, ReadingsSayWhatEveryConnectionDid) {
  const auto composition = two_tokenizers();
  const Ids ids = encoded(*composition, {"The keeper wrote until"})[0];
  std::vector<nn::ReadingRecord> readings;
  nn::Pass pass;
  pass.readings = &readings;
  torch::NoGradGuard no_grad;
  composition->hidden({nn::RaggedBatch::from_sequences({ids}), {{std::ssize(ids)}}}, pass);
  ASSERT_EQ(readings.size(), 2u);
  for (int64_t c = 0; c < 2; ++c) {
    const nn::ReadingRecord& record = readings[c];
    EXPECT_EQ(record.connection, c);
    EXPECT_EQ(record.added.size(0), std::ssize(ids));
    EXPECT_EQ(std::ssize(record.sources[0]), record.visible.back());
    EXPECT_TRUE(record.weights[0].sum(-1)[0][-1].allclose(torch::tensor(1.f)));
  }
  EXPECT_EQ(composition->structure()["connections"].size(), 2u);
  EXPECT_FALSE(composition->source_texts(0, readings[0].sources[0]).empty());
}

TEST(Composition, ReadingsShowWhatWasReadAsideInItsPlace) {
  const auto composition = with_all_forms("text");
  randomise(*composition);
  const Ids ids = encoded(*composition, {"The keeper's ships until tomorrow12"})[0];
  std::vector<nn::ReadingRecord> readings;
  nn::Pass pass;
  pass.readings = &readings;
  torch::NoGradGuard no_grad;
  composition->hidden({nn::RaggedBatch::from_sequences({ids})}, pass);
  ASSERT_EQ(readings.size(), 4U);
  for (const nn::ReadingRecord& record : readings) {
    ASSERT_EQ(record.weights[0].size(2), std::ssize(record.sources[0]));
    for (size_t t = 0; t < ids.size(); ++t) {
      const auto row = record.weights[0].select(1, static_cast<int64_t>(t));
      EXPECT_TRUE(row.slice(1, 0, record.visible[t]).sum(1).allclose(torch::ones(2))) << t;
      EXPECT_EQ(row.slice(1, record.visible[t]).abs().sum().item<float>(), 0.0F) << t;
    }
  }
}

TEST(Composition, NeighboursAndOrderDoNotMatter) {
  const auto composition = two_tokenizers();
  const auto sequences = encoded(*composition, kTexts);
  const auto all = logits_of(*composition, sequences);
  int64_t row = 0;
  for (const Ids& ids : sequences) {
    const int64_t end = row + std::ssize(ids);
    EXPECT_LT(relative_error(logits_of(*composition, {ids}), all.slice(0, row, end)), 1e-5);
    row = end;
  }
  const auto reversed = logits_of(*composition, {sequences.rbegin(), sequences.rend()});
  EXPECT_LT(
      relative_error(reversed.slice(0, 0, std::ssize(sequences[3])), all.slice(0, row - std::ssize(sequences[3]))),
      1e-5);
}

/// With rule `text` every position's newest state is that of the text so far, tokenised for itself.
TEST(Alignment, TextIsReadAtEveryPositionAsItsTokenizerWritesIt) {
  const auto composition = two_tokenizers({{{2, 3, /*newest=*/true}}, "text"});
  const auto& anchor = *composition->anchor_member().tokenizer;
  const auto& aug = *composition->augmenting()[0].tokenizer;
  int64_t aside = 0;
  for (const std::string text : {"The keeper wrote until tomorrow", "def f(x):\n    return x**2", "Möwen 👍🏽 12"}) {
    const Ids ids = anchor.encode(text, false);
    const auto texts = test::complete_texts(composition->anchor_member().tokenizer, ids);
    const AlignedBatch aligned = composition->align(nn::RaggedBatch::from_sequences({ids}), {})[0];
    if (!aligned.asides.empty()) aside += std::ssize(aligned.asides[0]);
    for (size_t t = 0; t < ids.size(); ++t) {
      Ids expected{0};  // BOS
      for (const int64_t id : aug.encode(texts[t], false)) expected.push_back(id);
      Ids seen(aligned.tokens[0].begin(), aligned.tokens[0].begin() + aligned.seen.visible[t]);
      if (!aligned.asides.empty()) {
        int64_t number = 0;
        for (size_t before = 0; before < t; ++before) {
          number += aligned.seen.aside[before].first < aligned.seen.aside[before].second ? 1 : 0;
        }
        const auto& [begin, end] = aligned.seen.aside[t];
        if (begin < end) {
          const Aside& own = aligned.asides[0][number];
          EXPECT_EQ(own.behind, aligned.seen.visible[t]);
          seen.insert(seen.end(), own.tokens.begin(), own.tokens.end());
        }
      }
      EXPECT_EQ(seen, expected) << "'" << texts[t] << "'";
    }
  }
  EXPECT_GT(aside, 5);
}

/// And its states are those of that text alone.
TEST(Composition, StatesAsideAreThoseOfTheTextSoFar) {
  const auto composition = with_all_forms("text");
  randomise(*composition);
  composition->eval();
  const Ids ids = composition->anchor_member().tokenizer->encode("The keeper's ships until tomorrow12", false);
  const auto all = logits_of(*composition, {ids});
  ASSERT_FALSE(composition->align(nn::RaggedBatch::from_sequences({ids}), {})[0].asides.empty());
  for (size_t t = 0; t < ids.size(); ++t) {
    const auto end = static_cast<int64_t>(t) + 1;
    const auto alone = logits_of(*composition, {Ids(ids.begin(), ids.begin() + end)});
    EXPECT_LT(relative_error(alone[end - 1], all[end - 1]), 2e-5) << t;
  }
}

TEST(SeveralAugmentingModels, TheirEffectsAreSummed) {
  const auto anchor = member("gpt2", 20, 3, 1), first = member("llama3", 14, 4, 2), second = member("llama2", 10, 3, 3);
  const AugmentingConfig one{{{0, 1}, {2, 2}}}, two{{{0, 0}, {2, 2}}};
  Composition alone(config_of({one}), anchor, {first}, 4), both(config_of({one, two}), anchor, {first, second}, 4),
      swapped(config_of({two, one}), anchor, {second, first}, 4);
  randomise(alone);
  randomise(both);
  torch::NoGradGuard no_grad;
  auto copy = [](Composition& to, const std::string& to_name, Composition& from, const std::string& from_name) {
    auto targets = to.named_parameters();
    for (const auto& item : from.named_parameters()) {
      if (!item.key().starts_with(from_name)) continue;
      targets[to_name + item.key().substr(from_name.size())].copy_(item.value());
    }
  };
  for (const char* k : {"0", "1"}) {
    const std::string name = std::string("connections.") + k + ".";
    copy(both, name, alone, name);
  }
  const auto sequences = encoded(alone, kTexts);
  // A second model whose output matrices are zero.
  for (const char* k : {"2", "3"}) {
    both.named_parameters()[std::string("connections.") + k + ".o_proj.weight"].zero_();
  }
  EXPECT_TRUE(torch::equal(logits_of(both, sequences), logits_of(alone, sequences)));
  randomise(both, 9);
  EXPECT_FALSE(torch::equal(logits_of(both, sequences), logits_of(alone, sequences)));
  for (const auto& [to, from] : {std::pair("0", "2"), {"1", "3"}, {"2", "0"}, {"3", "1"}}) {
    copy(swapped, std::string("connections.") + to + ".", both, std::string("connections.") + from + ".");
  }
  EXPECT_LT(relative_error(logits_of(swapped, sequences), logits_of(both, sequences)), 1e-5);
}

TEST(Composition, AlignmentOfOneBatchInFull) {
  const auto composition = two_tokenizers();
  const auto& anchor = *composition->anchor_member().tokenizer;
  const auto& aug = *composition->augmenting()[0].tokenizer;
  const Ids ids = anchor.encode("old long", false), old = aug.encode("old", false), more = aug.encode(" long", false);
  const auto aligned = composition->align(nn::RaggedBatch::from_sequences({ids}), {{std::ssize(ids)}})[0];
  const int64_t blank =
      std::find_if(ids.begin(), ids.end(), [&](int64_t id) { return anchor.decode({id}, true)[0] == ' '; }) -
      ids.begin();
  Ids tokens{0}, coordinates{0};  // BOS from the first position on, "old" once the blank is known, " long" at the end
  tokens.insert(tokens.end(), old.begin(), old.end());
  coordinates.resize(tokens.size(), blank);
  tokens.insert(tokens.end(), more.begin(), more.end());
  coordinates.resize(tokens.size(), std::ssize(ids) - 1);
  EXPECT_EQ(aligned.tokens[0], tokens);
  EXPECT_EQ(aligned.coordinates[0], coordinates);
}

}  // namespace
}  // namespace moesaic::compose
