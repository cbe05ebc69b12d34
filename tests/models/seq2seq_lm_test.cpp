#include "moesaic/models/seq2seq_lm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "moesaic/models/registry.h"
#include "tests/models/tiny_models.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::models {
namespace {

using test::MemoryCheckpoint;
using test::random_seq2seq;
using test::relative_error;
using test::tiny_seq2seq_configs;
using testing::HasSubstr;

const std::vector<std::vector<int64_t>> kSequences{
    {3, 1, 4, 1, 5, 9, 2, 6}, {52, 7}, {2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 0}};
const nn::Borders kBorders{{5}, {1}, {3}};
// Rows that predict something: from the border's on.
const std::vector<int64_t> kAnswers{4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21};

torch::Tensor states(Seq2SeqLM& model, const std::vector<std::vector<int64_t>>& sequences, const nn::Borders& borders,
                     Memory* memory = nullptr) {
  nn::Pass pass;
  return model.hidden({nn::RaggedBatch::from_sequences(sequences), borders}, pass, memory);
}

template <class Type>
std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Type& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(Seq2SeqLM, GradientCheckAlongARandomDirection) {
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config, torch::kFloat64);
    auto loss = [&] {
      return at::linear(states(*model, kSequences, kBorders), model->head().weight()).square().mean();
    };
    SCOPED_TRACE(name);
    test::expect_slope_matches(loss, model->parameters());
  }
}

TEST(Seq2SeqLM, TheFrozenBiasTakesTheFusedWay) {
  // With a gradient of one projection alone attention is LibTorch's flash kernel, forward and backward; with one of the
  // bias too it is the plain formula. float32 through four layers: 1e-5, gradients 5e-5.
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    if (name.starts_with("t5gemma")) continue;  // has no bias
    auto fused = random_seq2seq(config), plain = random_seq2seq(config);
    for (auto& item : plain->named_parameters()) {
      if (item.key().ends_with("relative_attention_bias.weight")) item.value().requires_grad_(true);
    }
    torch::Tensor gradients[2], outputs[2];
    int i = 0;
    for (auto& model : {fused, plain}) {
      auto query = model->named_parameters()["encoder.block.0.layer.0.SelfAttention.q.weight"].requires_grad_(true);
      outputs[i] = states(*model, kSequences, kBorders);
      outputs[i].square().sum().backward();
      gradients[i++] = query.grad();
    }
    EXPECT_LT(relative_error(outputs[0], outputs[1]), 1e-5) << name;
    EXPECT_LT(relative_error(gradients[0], gradients[1]), 5e-5) << name;
  }
}

TEST(Seq2SeqLM, RaggedEqualsOneByOne) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config);
    const auto together = states(*model, kSequences, kBorders);
    int64_t row = 0;
    for (size_t b = 0; b < kSequences.size(); ++b) {
      const auto length = std::ssize(kSequences[b]);
      const auto alone = states(*model, {kSequences[b]}, {kBorders[b]});
      EXPECT_LT(relative_error(together.narrow(0, row, length), alone), 1e-5) << name;
      row += length;
    }
  }
}

TEST(Seq2SeqLM, WhatSeesWhat) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config);
    auto run = [&](const std::vector<int64_t>& tokens) { return states(*model, {tokens}, {{3}}); };
    const auto before = run({1, 2, 3, 4, 5, 6});
    // A later token of the answer changes no earlier row; the last token of the prompt changes all of them.
    EXPECT_LT(relative_error(run({1, 2, 3, 4, 5, 50}).narrow(0, 0, 5), before.narrow(0, 0, 5)), 1e-6) << name;
    EXPECT_GT(relative_error(run({1, 2, 3, 4, 5, 50})[5], before[5]), 1e-3) << name;
    for (int64_t row = 0; row < 6; ++row) EXPECT_GT(relative_error(run({1, 2, 50, 4, 5, 6})[row], before[row]), 1e-3);
  }
}

TEST(Seq2SeqLM, TheStartTokenStandsInTheRowOfTheLastOfThePrompt) {
  torch::NoGradGuard no_grad;
  Json config = tiny_seq2seq_configs()[2].second;
  auto model = random_seq2seq(config);
  config["decoder_start_token_id"] = 4;
  auto other = random_seq2seq(config);
  const auto a = states(*model, {{1, 2, 3, 4, 5}}, {{3}}), b = states(*other, {{1, 2, 3, 4, 5}}, {{3}});
  EXPECT_TRUE(torch::equal(a.narrow(0, 0, 2), b.narrow(0, 0, 2)));
  for (int64_t row = 2; row < 5; ++row) EXPECT_GT(relative_error(a[row], b[row]), 1e-3);
  EXPECT_EQ(model->continued({1, 2, 3}), (std::vector<int64_t>{3}));
}

TEST(Seq2SeqLM, CachedEqualsFullWhateverTheChunks) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config);
    const auto full = states(*model, kSequences, kBorders);
    for (const int64_t chunk : {1, 2, 100}) {
      // Sequences of other lengths: those that have ended have no new row.
      const auto memory = model->memory(3);
      std::vector<int64_t> done(3, 0);
      std::vector<std::vector<torch::Tensor>> rows(3);
      while (true) {
        nn::RaggedBatch batch;
        std::vector<int64_t> tokens;
        batch.offsets = {0};
        for (size_t b = 0; b < 3; ++b) {
          int64_t count = done[b] == 0 ? kBorders[b][0] : chunk;
          count = std::min<int64_t>(count, std::ssize(kSequences[b]) - done[b]);
          tokens.insert(tokens.end(), kSequences[b].begin() + done[b], kSequences[b].begin() + done[b] + count);
          batch.offsets.push_back(std::ssize(tokens));
          done[b] += count;
        }
        if (tokens.empty()) break;
        batch.tokens = torch::tensor(tokens);
        nn::Pass pass;
        const auto got = model->hidden({batch}, pass, memory.get());
        for (size_t b = 0; b < 3; ++b) {
          rows[b].push_back(got.slice(0, batch.offsets[b], batch.offsets[b + 1]));
          EXPECT_EQ(memory->length(static_cast<int64_t>(b)), done[b]);
        }
      }
      std::vector<torch::Tensor> all;
      for (const auto& of_sequence : rows) all.insert(all.end(), of_sequence.begin(), of_sequence.end());
      EXPECT_LT(relative_error(torch::cat(all), full), 1e-5) << name << " by " << chunk;
    }
  }
}

TEST(Seq2SeqLM, SequencesJoinRepeatAreCutAndLeave) {
  torch::NoGradGuard no_grad;
  auto model = random_seq2seq(tiny_seq2seq_configs()[1].second);
  auto full = [&](const std::vector<int64_t>& tokens, int64_t border) {
    const auto all = states(*model, {tokens}, {{border}});
    return all[all.size(0) - 1];
  };
  const auto memory = model->memory(1);
  states(*model, {{5, 6, 7, 8, 9}}, {{3}}, memory.get());
  memory->add(1);
  // One continues, one begins.
  auto got = states(*model, {{10}, {20, 21}}, {{}, {2}}, memory.get());
  EXPECT_LT(relative_error(got[0], full({5, 6, 7, 8, 9, 10}, 3)), 1e-5);
  EXPECT_LT(relative_error(got[2], full({20, 21}, 2)), 1e-5);
  // The second twice, then the first: their answers go on apart.
  memory->keep({1, 1, 0});
  got = states(*model, {{30}, {31}, {11}}, {}, memory.get());
  EXPECT_LT(relative_error(got[0], full({20, 21, 30}, 2)), 1e-5);
  EXPECT_LT(relative_error(got[1], full({20, 21, 31}, 2)), 1e-5);
  EXPECT_LT(relative_error(got[2], full({5, 6, 7, 8, 9, 10, 11}, 3)), 1e-5);
  // Cut within its answer a sequence goes on from there; cut within its prompt it has to begin again.
  memory->truncate(2, 4);
  memory->truncate(0, 1);
  EXPECT_EQ(memory->length(2), 4);
  EXPECT_EQ(memory->length(0), 0);
  got = states(*model, {{40, 41}, {32}, {12}}, {{2}, {}, {}}, memory.get());
  EXPECT_LT(relative_error(got[1], full({40, 41}, 2)), 1e-5);
  EXPECT_LT(relative_error(got[3], full({5, 6, 7, 8, 12}, 3)), 1e-5);
}

TEST(Seq2SeqLM, OnlyAnswersArePredicted) {
  torch::NoGradGuard no_grad;
  auto model = random_seq2seq(tiny_seq2seq_configs()[0].second);
  Text text{nn::RaggedBatch::from_sequences(kSequences), kBorders};
  nn::Pass pass;
  const auto all = model->hidden(text, pass);
  text.rows = torch::tensor(kAnswers);
  nn::Pass wanted;
  EXPECT_TRUE(torch::equal(model->hidden(text, wanted), all.index_select(0, text.rows)));
  text.rows = torch::tensor({4, 3});
  EXPECT_THAT(message_of<UsageError>([&] { model->hidden(text, pass); }), HasSubstr("a token of a prompt"));
}

TEST(Seq2SeqLM, TheFileDecidesWhetherTheHeadIsTied) {
  const Json config = tiny_seq2seq_configs()[0].second;  // says nothing: tied
  auto untied = config;
  untied["scale_decoder_outputs"] = false;
  const auto own = random_seq2seq(untied);
  MemoryCheckpoint file(config, *own);
  const auto loaded = std::dynamic_pointer_cast<Seq2SeqLM>(load_model(file));
  EXPECT_FALSE(loaded->config().tie_word_embeddings);
  EXPECT_TRUE(torch::equal(loaded->head().weight(), own->head().weight()));
  file.tensors["lm_head.weight"] = file.tensors["shared.weight"].clone();
  EXPECT_TRUE(std::dynamic_pointer_cast<Seq2SeqLM>(load_model(file))->config().tie_word_embeddings);
  file.tensors.erase("lm_head.weight");
  file.config_is(untied);
  EXPECT_TRUE(std::dynamic_pointer_cast<Seq2SeqLM>(load_model(file))->config().tie_word_embeddings);
}

TEST(Seq2SeqLM, EverythingThatDoesNotFitIsSaidAtOnce) {
  const Json config = tiny_seq2seq_configs()[0].second;
  MemoryCheckpoint file(config, *random_seq2seq(config));
  file.tensors.erase("decoder.block.2.layer.1.EncDecAttention.v.weight");
  file.tensors["encoder.block.7.layer.0.layer_norm.weight"] = torch::ones({24});
  file.tensors["encoder.final_layer_norm.weight"] = torch::ones({25});
  const auto message = message_of<DataError>([&] { load_model(file); });
  EXPECT_THAT(message, HasSubstr("decoder.block.2.layer.1.EncDecAttention.v.weight"));
  EXPECT_THAT(message, HasSubstr("encoder.block.7.layer.0.layer_norm.weight"));
  EXPECT_THAT(message, HasSubstr("encoder.final_layer_norm.weight: got [25], expected [24]"));
}

TEST(Seq2SeqLM, EverythingWrongWithAConfigIsSaidAtOnce) {
  Json config = tiny_seq2seq_configs()[0].second;
  config.update({{"d_model", -1},
                 {"feed_forward_proj", "gated-tanh"},
                 {"relative_attention_max_distance", 4},
                 {"decoder_start_token_id", 53},
                 {"is_encoder_decoder", false}});
  const auto message = message_of<ConfigError>([&] { make_model(config, "config.json", torch::kMeta); });
  for (const char* key : {"d_model", "gated-tanh", "max_distance", "decoder_start_token_id", "is_encoder_decoder"}) {
    EXPECT_THAT(message, HasSubstr(key));
  }
  config.erase("is_encoder_decoder");
  EXPECT_THAT(message_of<ConfigError>([&] { make_model(config, "config.json", torch::kMeta); }),
              HasSubstr("'is_encoder_decoder': is missing"));
  EXPECT_THAT(message_of<ConfigError>([&] { parse_decoder_config(config, "config.json"); }),
              HasSubstr("\"t5\", an encoder-decoder, expected a decoder"));
  EXPECT_THAT(message_of<UsageError>([] { random_seq2seq(tiny_seq2seq_configs()[0].second, torch::kHalf); }),
              HasSubstr("float16"));
}

/// A Switch whose experts have room for `capacity` tokens of a text.
std::shared_ptr<Seq2SeqLM> switch_model(int64_t capacity) {
  for (auto [name, config] : tiny_seq2seq_configs()) {
    if (name != "switch") continue;
    config["expert_capacity"] = capacity;
    return random_seq2seq(config);
  }
  throw std::logic_error("no switch");
}

TEST(Seq2SeqLM, AFullExpertAddsNothing) {
  torch::NoGradGuard no_grad;
  const auto small = switch_model(2), large = switch_model(100);
  const auto of_small = states(*small, kSequences, kBorders), of_large = states(*large, kSequences, kBorders);
  EXPECT_GT(relative_error(of_small, of_large), 1e-2);
  // Two tokens of a text never fill one.
  EXPECT_LT(relative_error(of_small.narrow(0, 8, 2), of_large.narrow(0, 8, 2)), 1e-6);
}

TEST(Seq2SeqLM, AnExpertsRoomIsThatOfTheTextThatIsKept) {
  torch::NoGradGuard no_grad;
  const auto model = switch_model(2);
  const auto memory = model->memory(1);
  states(*model, {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, {{3}}, memory.get());
  memory->truncate(0, 5);  // what came behind leaves its room
  memory->keep({0, 0});
  const auto got = states(*model, {{20, 21, 22, 23}, {30, 31, 32, 33}}, {}, memory.get());
  EXPECT_LT(
      relative_error(got.narrow(0, 0, 4), states(*model, {{1, 2, 3, 4, 5, 20, 21, 22, 23}}, {{3}}).narrow(0, 5, 4)),
      1e-5);
  EXPECT_LT(
      relative_error(got.narrow(0, 4, 4), states(*model, {{1, 2, 3, 4, 5, 30, 31, 32, 33}}, {{3}}).narrow(0, 5, 4)),
      1e-5);
}

/// A T5 whose layers add nothing: its states are norms of its embeddings, and its dropout shows as zeros.
std::shared_ptr<Seq2SeqLM> embedding_alone() {
  torch::NoGradGuard no_grad;
  auto model = random_seq2seq(tiny_seq2seq_configs()[0].second);
  for (auto& item : model->named_parameters()) {
    if (item.key().ends_with(".o.weight") || item.key().ends_with(".wo.weight")) item.value().zero_();
  }
  return model;
}

TEST(Seq2SeqLM, DropoutIsDrawnOnceForAWholeSequence) {
  auto model = embedding_alone();
  torch::manual_seed(1);
  nn::Pass pass;
  pass.training = true;
  pass.dropout = 0.5;
  const auto batch = nn::RaggedBatch::from_sequences({{7, 7, 7, 7}, {7, 7}});
  const torch::Tensor states = model->encode(batch, pass);
  for (const int64_t row : {1, 2, 3}) EXPECT_TRUE(torch::equal(states[row], states[0]));
  EXPECT_TRUE(torch::equal(states[5], states[4]));
  EXPECT_FALSE(torch::equal(states[4], states[0]));
  // Dropped at the embedding or behind the norm: a quarter of 24 columns is left.
  EXPECT_GT((states[0] == 0).sum().item<int64_t>(), 8);
  EXPECT_LT((states[0] == 0).sum().item<int64_t>(), 24);
  nn::Pass evaluating;
  evaluating.dropout = 0.5;
  EXPECT_EQ((model->encode(batch, evaluating) == 0).sum().item<int64_t>(), 0);
}

TEST(Seq2SeqLM, DropoutActsInTheirLayers) {
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config);
    if (!model->facts().has_dropout) continue;
    nn::Pass plain, a, b;
    a.training = b.training = true;
    a.dropout = b.dropout = 0.1;
    const Text text{nn::RaggedBatch::from_sequences(kSequences), kBorders};
    const auto expected = model->hidden(text, plain);
    torch::manual_seed(1);
    const auto first = model->hidden(text, a), second = model->hidden(text, b);
    EXPECT_GT(relative_error(first, second), 1e-2) << name;
    EXPECT_GT(relative_error(first, expected), 1e-2) << name;
  }
}

TEST(Seq2SeqLM, DropoutsGradientIsThatOfWhatWasDropped) {
  for (const auto& [name, config] : tiny_seq2seq_configs()) {
    auto model = random_seq2seq(config, torch::kFloat64);
    if (!model->facts().has_dropout || name == "switch") continue;  // a step may choose another expert
    auto loss = [&] {
      torch::manual_seed(3);
      nn::Pass pass;
      pass.training = true;
      pass.dropout = 0.2;
      const auto h = model->hidden({nn::RaggedBatch::from_sequences(kSequences), kBorders}, pass);
      return at::linear(h, model->head().weight()).square().mean();
    };
    SCOPED_TRACE(name);
    test::expect_slope_matches(loss, model->parameters());
  }
}

/// An adapter whose routers read what the frozen model says of a prompt.
struct ReadsPrompts : nn::Attachment {
  nn::Needs needs() const override { return {.sentence = nn::Needs::Sentence::kHidden, .sentence_width = 24}; }
  void name_as(const std::string& owner, int64_t) override { owner_ = owner; }
  void detach() override {}
};

TEST(Seq2SeqLM, APromptsVectorIsTheMeanOfTheEncodersStates) {
  torch::NoGradGuard no_grad;
  auto model = random_seq2seq(tiny_seq2seq_configs()[0].second);
  model->attach("reader", std::make_shared<ReadsPrompts>());
  Text text{nn::RaggedBatch::from_sequences(kSequences), kBorders};
  for (size_t b = 0; b < kSequences.size(); ++b) {
    text.prompts.emplace_back(kSequences[b].begin(), kSequences[b].begin() + kBorders[b][0]);
  }
  nn::Pass pass;
  model->hidden(text, pass);
  for (size_t b = 0; b < kSequences.size(); ++b) {
    nn::Pass own;
    const auto mean = model->encode(nn::RaggedBatch::from_sequences({text.prompts[b]}), own).mean(0);
    EXPECT_LT(relative_error(pass.sentence[static_cast<int64_t>(b)], mean), 1e-5);
  }
}

TEST(Seq2SeqLM, SitesOfEveryPart) {
  auto model = random_seq2seq(tiny_seq2seq_configs()[1].second);
  std::set<std::string> linears;
  for (const nn::LinearSite& site : model->sites().linears) linears.insert(site.name);
  // Two encoder layers of 4 + 3 linears, two of the decoder with 4 more each.
  EXPECT_EQ(linears.size(), 2 * 7 + 2 * 11);
  EXPECT_TRUE(linears.contains("decoder.block.1.layer.1.EncDecAttention.o"));
  EXPECT_TRUE(linears.contains("encoder.block.0.layer.1.DenseReluDense.wi_1"));
  EXPECT_EQ(model->sites().linears.back().layer, 3);  // counted through both halves
}

}  // namespace
}  // namespace moesaic::models
