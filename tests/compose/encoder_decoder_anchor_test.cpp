// An encoder-decoder as the anchor: its decoder reads augmenting models.
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
using Ids = std::vector<int64_t>;

const AugmentingConfig kByWord{{{-1, 0}, {0, 1}, {2, 3}}, "word", "causal"};

std::shared_ptr<Composition> with_decoder(const AugmentingConfig& how = kByWord) {
  auto composition = std::make_shared<Composition>(test::config_of({how}, 1), test::encoder_member(2),
                                                   std::vector{test::member("llama3", 14, 4, 2)}, 7);
  test::randomise(*composition);
  return composition;
}

struct Texts {
  std::vector<Ids> ids;
  nn::Borders borders;
};
Texts texts_of(const Composition& composition) {
  Texts texts;
  for (const auto& [prompt, answer] : {std::pair("The keeper wrote until", "tomorrow, nobody will 12"),
                                       {"M\xC3\xB6wen", "book x"},
                                       {"The keeper wrote of the lighthouse book", ""}}) {
    Ids ids = composition.anchor_member().tokenizer->encode_start(prompt).ids;
    texts.borders.push_back({std::ssize(ids)});
    for (const int64_t id : composition.anchor_member().tokenizer->encode_behind(answer)) ids.push_back(id);
    texts.ids.push_back(ids);
  }
  return texts;
}

TEST(EncoderDecoderAsAnchor, ItsDecoderReadsAndItsEncoderDoesNot) {
  const auto composition = with_decoder();
  const Texts texts = texts_of(*composition);
  const auto logits = logits_of(*composition, texts.ids, texts.borders);
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  const auto& anchor = *composition->anchor_member().model;
  const auto plain = anchor.head().logits(
      composition->anchor_member().model->hidden({nn::RaggedBatch::from_sequences(texts.ids), texts.borders}, pass));
  int64_t row = 0;
  for (size_t b = 0; b < texts.ids.size(); ++b) {
    const int64_t end = row + std::ssize(texts.ids[b]), first = row + texts.borders[b][0] - 1;
    EXPECT_TRUE(torch::equal(logits.slice(0, row, first), plain.slice(0, row, first))) << "before the border";
    EXPECT_GT(relative_error(logits.slice(0, first, end), plain.slice(0, first, end)), 0.02);
    row = end;
  }
  // Of the answer no token moves a row before it.
  const Ids& ids = texts.ids[0];
  const auto alone = logits_of(*composition, {ids}, {texts.borders[0]});
  for (auto t = static_cast<size_t>(texts.borders[0][0]); t < ids.size(); ++t) {
    Ids changed = ids;
    for (size_t i = t; i < ids.size(); ++i) changed[i] = (changed[i] + 11) % 40;
    const auto end = static_cast<int64_t>(t);
    EXPECT_LT(
        relative_error(logits_of(*composition, {changed}, {texts.borders[0]}).slice(0, 0, end), alone.slice(0, 0, end)),
        1e-6)
        << t;
  }
}

TEST(EncoderDecoderAsAnchor, ZeroConnectionsAreTheAnchor) {
  Composition composition(test::config_of({kByWord}, 1), test::encoder_member(2), {test::member("llama3", 14, 4, 2)},
                          7);
  const Texts texts = texts_of(composition);
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  models::SingleModel& anchor = *composition.anchor_member().model;
  EXPECT_TRUE(torch::equal(
      logits_of(composition, texts.ids, texts.borders),
      anchor.head().logits(anchor.hidden({nn::RaggedBatch::from_sequences(texts.ids), texts.borders}, pass))));
}

TEST(EncoderDecoderAsAnchor, TokenByTokenEqualsAtOnce) {
  torch::NoGradGuard no_grad;
  for (const char* align : {"word", "token", "text"}) {
    const auto composition = with_decoder({{{0, 1}, {2, 3}}, align, "causal"});
    const Texts texts = texts_of(*composition);
    const auto whole = logits_of(*composition, texts.ids, texts.borders);
    const auto memory = composition->memory(std::ssize(texts.ids));
    std::vector<std::vector<torch::Tensor>> rows(texts.ids.size());
    std::vector<size_t> done(texts.ids.size(), 0);
    for (int step = 0; step < 40; ++step) {
      nn::RaggedBatch batch{{}, {0}};
      Ids tokens;
      for (size_t b = 0; b < texts.ids.size(); ++b) {
        const size_t count = step == 0 ? texts.borders[b][0] : 1, from = done[b];
        done[b] = std::min(from + count, texts.ids[b].size());
        tokens.insert(tokens.end(), texts.ids[b].begin() + from, texts.ids[b].begin() + done[b]);
        batch.offsets.push_back(std::ssize(tokens));
      }
      if (tokens.empty()) break;
      batch.tokens = torch::tensor(tokens, torch::kInt64);
      nn::Pass pass;
      const auto logits = composition->head().logits(
          composition->hidden({batch, step == 0 ? texts.borders : nn::Borders{}}, pass, memory.get()));
      for (size_t b = 0; b < texts.ids.size(); ++b) {
        rows[b].push_back(logits.slice(0, batch.offsets[b], batch.offsets[b + 1]));
        EXPECT_EQ(memory->length(static_cast<int64_t>(b)), static_cast<int64_t>(done[b]));
      }
    }
    std::vector<torch::Tensor> all;
    for (const auto& parts : rows) all.insert(all.end(), parts.begin(), parts.end());
    EXPECT_LT(relative_error(torch::cat(all), whole), 1e-5) << align;
  }
}

TEST(EncoderDecoderAsAnchor, MemoryIsCutAndCopied) {
  torch::NoGradGuard no_grad;
  const auto composition = with_decoder();
  const Texts texts = texts_of(*composition);
  const Ids& ids = texts.ids[0];
  const int64_t border = texts.borders[0][0];
  const auto memory = composition->memory(1);
  logits_of(*composition, {ids}, {texts.borders[0]}, memory.get());
  memory->truncate(0, border);
  memory->keep({0, 0});
  const Ids rest(ids.begin() + border, ids.end());
  const auto both = logits_of(*composition, {rest, rest}, {}, memory.get());
  const auto whole = logits_of(*composition, {ids}, {texts.borders[0]});
  EXPECT_LT(relative_error(both, torch::cat({whole.slice(0, border), whole.slice(0, border)})), 1e-5);
  memory->truncate(1, 2);  // into the prompt: all of it is forgotten
  EXPECT_EQ(memory->length(1), 0);
  memory->keep({1});
  EXPECT_LT(relative_error(logits_of(*composition, {ids}, {texts.borders[0]}, memory.get()), whole), 1e-5);
}

TEST(EncoderDecoderAsAnchor, TrainsWithKeptStates) {
  const auto composition = with_decoder();
  const Texts texts = texts_of(*composition);
  auto gradients = [&] {
    composition->zero_grad();
    nn::Pass pass;
    pass.training = true;
    pass.dropout = 0.5;  // the anchor is frozen
    composition->hidden({nn::RaggedBatch::from_sequences(texts.ids), texts.borders}, pass).square().sum().backward();
    std::vector<torch::Tensor> all;
    for (const auto& parameter : composition->parameters()) all.push_back(parameter.grad().flatten());
    return torch::cat(all);
  };
  EXPECT_FALSE(composition->facts().has_dropout);
  const auto live = gradients();
  EXPECT_GT(live.abs().max().item<float>(), 0.0f);
  composition->train();
  const auto states = std::make_shared<StateCache>(1 << 20);
  composition->keep_states(states);
  for (int i = 0; i < 2; ++i) EXPECT_LT(relative_error(gradients(), live), 1e-5) << i;
  EXPECT_EQ(states->hits(), std::ssize(texts.ids));  // the augmenting model's
}

TEST(EncoderDecoderAsAnchor, ReadingsStandAtTheRowsOfTheText) {
  torch::NoGradGuard no_grad;
  const auto composition = with_decoder();
  const Texts texts = texts_of(*composition);
  std::vector<nn::ReadingRecord> readings;
  nn::Pass pass;
  pass.readings = &readings;
  const auto batch = nn::RaggedBatch::from_sequences(texts.ids);
  composition->hidden({batch, texts.borders}, pass);
  ASSERT_EQ(readings.size(), 3U);
  for (const nn::ReadingRecord& record : readings) {
    EXPECT_EQ(record.query_offsets, batch.offsets);
    EXPECT_EQ(std::ssize(record.visible), batch.num_tokens());
    for (size_t b = 0; b < texts.ids.size(); ++b) {
      const int64_t begin = batch.offsets[b], first = begin + texts.borders[b][0] - 1;
      EXPECT_EQ(record.added.slice(0, begin, first).abs().sum().item<float>(), 0.0f);
      EXPECT_GT(record.added[first].item<float>(), 0.0f);
      EXPECT_EQ(record.weights[b].size(1), std::ssize(texts.ids[b]));
      EXPECT_NEAR(record.weights[b].select(1, first - begin).sum().item<float>(), 1.0f, 1e-5);
    }
  }
}

TEST(EncoderDecoderAsAnchor, AFolderHoldsIt) {
  const test::TemporaryFolder root;
  const auto anchor = test::encoder_member(2), reader = test::member("llama3", 14, 4, 2);
  test::write_member(root.path() / "t5", anchor, test::small_encoder_config(anchor.tokenizer->vocab_size()));
  test::write_member(root.path() / "aug", reader, test::small_config(reader.tokenizer->vocab_size(), 14, 4));
  auto open = [&](const char* name) { return open_member(models::open_checkpoint(root.path() / name), {}); };
  Composition composition(test::config_of({kByWord}, 1), open("t5"), {open("aug")}, 7);
  test::randomise(composition);
  const Texts texts = texts_of(composition);
  save_composition(composition, root.path() / "calm");
  const auto loaded = load_composition(root.path() / "calm", {});
  EXPECT_TRUE(
      torch::equal(logits_of(*loaded, texts.ids, texts.borders), logits_of(composition, texts.ids, texts.borders)));
}

}  // namespace
}  // namespace moesaic::compose
