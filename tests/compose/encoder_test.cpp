// An encoder-decoder as the augmenting model: its encoder reads the prompt.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/models/registry.h"
#include "tests/compose/small_models.h"
#include "tests/nn/gradcheck.h"
#include "tests/temporary_folder.h"

namespace moesaic::compose {
namespace {

using test::logits_of;
using test::relative_error;
using ::testing::HasSubstr;
using Ids = std::vector<int64_t>;

const AugmentingConfig kPrefix{{{0, -1}, {1, 0}, {2, 1}}, "word", "prefix"};

std::shared_ptr<Composition> with_encoder(const AugmentingConfig& how = kPrefix) {
  auto composition = std::make_shared<Composition>(test::config_of({how}), test::member("gpt2", 20, 3, 1),
                                                   std::vector{test::encoder_member(2)}, 7);
  test::randomise(*composition);
  return composition;
}

struct Texts {
  std::vector<Ids> ids;
  nn::Borders borders;
};
Texts texts_of(const Composition& composition) {
  Texts texts;
  for (const auto& [prompt, answer] : {std::pair("The keeper wrote until", " tomorrow, nobody'll 12"),
                                       {"M\xC3\xB6wen", " \xE4\xBA\xBA x"},
                                       {"a b c d e f g h i j k", ""}}) {
    Ids ids = composition.anchor_member().tokenizer->encode(prompt, false);
    texts.borders.push_back({std::ssize(ids)});
    for (const int64_t id : composition.anchor_member().tokenizer->encode(answer, false)) ids.push_back(id);
    texts.ids.push_back(ids);
  }
  return texts;
}

TEST(EncoderAsAugmenting, ReadsThePromptAndNothingBehindIt) {
  const auto composition = with_encoder();
  const Texts texts = texts_of(*composition);
  const auto logits = logits_of(*composition, texts.ids, texts.borders);
  const auto plain = test::logits_of(*composition->anchor_member().model, texts.ids);
  int64_t row = 0;
  for (size_t b = 0; b < texts.ids.size(); ++b) {
    const int64_t end = row + std::ssize(texts.ids[b]), first = row + texts.borders[b][0] - 1;
    EXPECT_TRUE(torch::equal(logits.slice(0, row, first), plain.slice(0, row, first))) << "before the border";
    EXPECT_GT(relative_error(logits.slice(0, first, end), plain.slice(0, first, end)), 0.02);
    row = end;
  }
  // Tokens of the answer: no row before them moves, bit for bit.
  const Ids& ids = texts.ids[0];
  const auto alone = logits_of(*composition, {ids}, {texts.borders[0]});
  for (auto t = static_cast<size_t>(texts.borders[0][0]); t < ids.size(); ++t) {
    Ids changed = ids;
    for (size_t i = t; i < ids.size(); ++i) changed[i] = (changed[i] + 101) % 400;
    const auto other = logits_of(*composition, {changed}, {texts.borders[0]});
    const auto end = static_cast<int64_t>(t);
    EXPECT_TRUE(torch::equal(other.slice(0, 0, end), alone.slice(0, 0, end))) << t;
  }
  // Without a border nothing is read.
  EXPECT_TRUE(
      torch::equal(logits_of(*composition, {ids}), test::logits_of(*composition->anchor_member().model, {ids})));
}

TEST(EncoderAsAugmenting, TokenByTokenEqualsAtOnce) {
  torch::NoGradGuard no_grad;
  const auto composition = with_encoder();
  const Texts texts = texts_of(*composition);
  const auto whole = logits_of(*composition, texts.ids, texts.borders);
  // In pieces of 1 to 3 tokens, so that prompts end in different calls; a sequence may have ended.
  for (const size_t step : {1, 3}) {
    const auto memory = composition->memory(std::ssize(texts.ids));
    std::vector<std::vector<torch::Tensor>> rows(texts.ids.size());
    for (size_t at = 0; at < 40; at += step) {
      nn::RaggedBatch batch{{}, {0}};
      Ids tokens;
      for (const Ids& ids : texts.ids) {
        for (size_t i = at; i < std::min(at + step, ids.size()); ++i) tokens.push_back(ids[i]);
        batch.offsets.push_back(std::ssize(tokens));
      }
      if (tokens.empty()) break;
      batch.tokens = torch::tensor(tokens, torch::kInt64);
      nn::Pass pass;
      const auto logits = composition->head().logits(composition->hidden({batch, texts.borders}, pass, memory.get()));
      for (size_t b = 0; b < texts.ids.size(); ++b) {
        rows[b].push_back(logits.slice(0, batch.offsets[b], batch.offsets[b + 1]));
      }
    }
    std::vector<torch::Tensor> all;
    for (const auto& parts : rows) all.insert(all.end(), parts.begin(), parts.end());
    EXPECT_LT(relative_error(torch::cat(all), whole), 1e-5) << step;
  }
}

TEST(EncoderAsAugmenting, MemoryIsCutAndCopied) {
  torch::NoGradGuard no_grad;
  const auto composition = with_encoder();
  const Texts texts = texts_of(*composition);
  const Ids& ids = texts.ids[0];
  const int64_t border = texts.borders[0][0];
  const auto memory = composition->memory(1);
  logits_of(*composition, {ids}, {texts.borders[0]}, memory.get());
  memory->truncate(0, border);
  memory->keep({0, 0});
  const Ids rest(ids.begin() + border, ids.end());
  const auto both = logits_of(*composition, {rest, rest}, {}, memory.get());
  const auto whole = logits_of(*composition, {ids}, {texts.borders[0]}).slice(0, border);
  EXPECT_LT(relative_error(both, torch::cat({whole, whole})), 1e-5);
  memory->truncate(1, 2);  // into the prompt: what was read of it is forgotten
  memory->keep({1});
  const Ids again(ids.begin() + 2, ids.end());
  const auto anew = logits_of(*composition, {again}, {texts.borders[0]}, memory.get());
  EXPECT_LT(relative_error(anew.slice(0, border - 2), whole), 1e-5);
}

TEST(EncoderAsAugmenting, TrainsFromKeptStates) {
  const auto composition = with_encoder();
  const Texts texts = texts_of(*composition);
  auto gradients = [&] {
    composition->zero_grad();
    nn::Pass pass;
    pass.training = true;
    const auto batch = nn::RaggedBatch::from_sequences(texts.ids);
    composition->hidden({batch, texts.borders}, pass).square().sum().backward();
    std::vector<torch::Tensor> all;
    for (const auto& parameter : composition->parameters()) all.push_back(parameter.grad().flatten());
    return torch::cat(all);
  };
  const auto live = gradients();
  EXPECT_GT(live.abs().max().item<float>(), 0.0f);
  composition->train();
  const auto states = std::make_shared<StateCache>(1 << 20);
  composition->keep_states(states);
  for (int i = 0; i < 2; ++i) EXPECT_LT(relative_error(gradients(), live), 1e-5) << i;
  EXPECT_EQ(states->misses(), 2 * std::ssize(texts.ids));  // of the anchor's and the encoder's
  EXPECT_EQ(states->hits(), 2 * std::ssize(texts.ids));
}

TEST(EncoderAsAugmenting, ItsFinalStateIsTheEncodersAndItsBlocksAreToo) {
  Composition composition(test::config_of({{{{1, kFinal}}, "word", "prefix"}}), test::member("gpt2", 20, 3, 1),
                          {test::encoder_member(2)}, 3);
  EXPECT_EQ(composition.blocks().size(), 3U + 3U);  // none of the decoder's
}

TEST(EncoderAsAugmenting, FolderKeepsTheEncoderAlone) {
  const test::TemporaryFolder root;
  const auto anchor = test::member("gpt2", 20, 3, 1), encoder = test::encoder_member(2);
  test::write_member(root.path() / "anchor", anchor, test::small_config(anchor.tokenizer->vocab_size(), 20, 3));
  test::write_member(root.path() / "t5", encoder, test::small_encoder_config(encoder.tokenizer->vocab_size()));
  auto open = [&](const char* name) { return open_member(models::open_checkpoint(root.path() / name), {}); };
  Composition composition(test::config_of({kPrefix}), open("anchor"), {open("t5")}, 7);
  test::randomise(composition);
  const Texts texts = texts_of(composition);
  save_composition(composition, root.path() / "calm");
  const auto loaded = load_composition(root.path() / "calm", {});
  EXPECT_TRUE(
      torch::equal(logits_of(*loaded, texts.ids, texts.borders), logits_of(composition, texts.ids, texts.borders)));
  std::vector<std::string> names;
  for (const auto& item : loaded->augmenting()[0].model->named_parameters()) names.push_back(item.key());
  // Two of three blocks are read, none of the decoder.
  EXPECT_THAT(names, testing::Contains(HasSubstr("encoder.block.1.")));
  EXPECT_THAT(names, testing::Not(testing::Contains(HasSubstr("encoder.block.2."))));
  EXPECT_THAT(names, testing::Not(testing::Contains(HasSubstr("decoder.block."))));
}

TEST(EncoderAsAugmenting, WhatCanNotBe) {
  auto error_of = [](const AugmentingConfig& how, const Member& anchor) -> std::string {
    try {
      Composition(test::config_of({how}), anchor, {test::encoder_member(2)}, 7);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "is made";
  };
  const Member anchor = test::member("gpt2", 20, 3, 1);
  EXPECT_THAT(error_of({{{0, 0}}, "word", "causal"}, anchor), HasSubstr("mask: got 'causal', expected prefix"));
  EXPECT_THAT(error_of({{{0, 0}}, "token", "prefix"}, anchor), HasSubstr("align: got 'token', expected word"));
  EXPECT_THAT(error_of({{{0, 3}}, "word", "prefix"}, anchor), HasSubstr("aug 3"));  // the encoder has three blocks
  const Member t5 = test::encoder_member(1);                                        // three blocks in the decoder, too
  EXPECT_THAT(error_of({{{3, 0}}, "word", "prefix"}, t5), HasSubstr("anchor 3"));
  EXPECT_THAT(error_of({{{kFinal, 0}}, "word", "prefix"}, t5), HasSubstr("got anchor final, expected a block of the"));
}

}  // namespace
}  // namespace moesaic::compose
