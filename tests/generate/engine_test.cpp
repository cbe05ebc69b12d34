#include "moesaic/generate/engine.h"

#include <gtest/gtest.h>

#include <random>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/nn/linear.h"
#include "tests/generate/tiny_model.h"

namespace moesaic::generate {
namespace {

using testing::tiny_model;
using testing::word_tokenizer;
using Ids = std::vector<int64_t>;

/// Keeps all that it hears.
struct Heard : Listener {
  void began(int64_t tokens, std::vector<TokenLogprob> scores) override {
    reused = tokens;
    prompt = std::move(scores);
  }
  bool more(int64_t answer, Piece piece) override {
    pieces.resize(std::max<size_t>(pieces.size(), answer + 1));
    pieces[answer].push_back(std::move(piece));
    return std::ssize(pieces[answer]) < most;
  }
  void failed(std::exception_ptr why) override { error = why; }

  std::vector<float> logprobs(int64_t answer = 0) const {
    std::vector<float> values;
    for (const Piece& piece : pieces.at(answer)) values.push_back(piece.logprob->logprob);
    return values;
  }
  Ids ids(int64_t answer = 0) const {
    Ids tokens;
    for (const Piece& piece : pieces.at(answer)) tokens.push_back(piece.id);
    return tokens;
  }

  int64_t reused = -1;
  std::vector<TokenLogprob> prompt;
  std::vector<std::vector<Piece>> pieces;
  std::exception_ptr error;
  int64_t most = INT64_MAX;
};

/// An adapter of `method` whose every number is drawn, so that it has an effect.
std::shared_ptr<adapters::Adapter> random_adapter(models::CausalLM& model, const std::string& method, int64_t experts,
                                                  int64_t rank, uint64_t seed, const Json& router = Json::object()) {
  adapters::AdapterConfig config;
  config.method = method;
  config.num_experts = experts;
  config.lora_rank = rank;
  config.router = adapters::parse_router_config(router, "router");
  config = adapters::resolve_targets(std::move(config), adapters::method_of(method).low_rank ? "all-linear" : "",
                                     model.sites());
  auto adapter = adapters::Adapter::create(std::move(config), model.sites(), torch::kCPU, seed);
  formats::TensorMap tensors = adapter->folder().tensors;
  torch::manual_seed(seed);
  for (auto& [name, tensor] : tensors) tensor = tensor + 0.3 * torch::randn_like(tensor);
  adapter->load_tensors(tensors);
  adapter->set_trainable(false);
  return adapter;
}

class EngineTest : public ::testing::Test {
 protected:
  Request request(Ids ids, int64_t tokens = 8) const {
    Request wanted{{std::move(ids)}, {.max_new_tokens = tokens}};
    wanted.logprobs = 2;
    return wanted;
  }
  Ids random_ids(std::mt19937& random, int64_t length) const {
    Ids ids;
    for (int64_t i = 0; i < length; ++i) ids.push_back(2 + static_cast<int64_t>(random() % (testing::kTinyVocab - 2)));
    return ids;
  }
  std::shared_ptr<Heard> alone(const Request& wanted, EngineOptions options = {}) {
    Engine engine(*model_, *tokenizer_, std::move(options));
    const auto heard = std::make_shared<Heard>();
    engine.submit(wanted, heard);
    while (engine.step()) {
    }
    return heard;
  }

  std::shared_ptr<models::CausalLM> model_ = tiny_model();
  std::shared_ptr<tokenizer::Tokenizer> tokenizer_ = word_tokenizer();
};

TEST_F(EngineTest, RequestsJoinAndLeaveAndAnswerAsGenerateDoes) {
  Engine engine(*model_, *tokenizer_, {.most_answers = 2});
  std::vector<std::shared_ptr<Heard>> heard;
  const std::vector<Ids> prompts{{5, 6, 7}, {8}, {3, 9, 4, 11, 12, 20, 21}, {2, 2}};
  for (size_t i = 0; i < prompts.size(); ++i) {
    heard.push_back(std::make_shared<Heard>());
    engine.submit(request(prompts[i], 3 + static_cast<int64_t>(i)), heard.back());
    if (i == 1) engine.step();
  }
  EXPECT_EQ(engine.waiting(), 2);
  EXPECT_EQ(engine.answers(), 2);
  while (engine.step()) {
    EXPECT_LE(engine.answers(), 2);
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Generation expected =
        generate(*model_, *tokenizer_, {{prompts[i]}}, {.max_new_tokens = 3 + static_cast<int64_t>(i)})[0];
    EXPECT_EQ(heard[i]->ids(), expected.ids);
    std::string text;
    for (const Piece& piece : heard[i]->pieces[0]) text += piece.text;
    EXPECT_EQ(text, expected.text);
    EXPECT_EQ(heard[i]->pieces[0].back().finish_reason, "length");
  }
}

TEST_F(EngineTest, LogprobsAreTheModelsOwn) {
  Request wanted = request({3, 9, 4, 11}, 4);
  wanted.prompt_logprobs = true;
  wanted.sampling.temperature = 0.7;
  wanted.sampling.repetition_penalty = 1.5;
  const auto heard = alone(wanted);
  Ids all{3, 9, 4, 11};
  const Ids answer = heard->ids();
  all.insert(all.end(), answer.begin(), answer.end());
  const std::vector<float> expected = score(*model_, {{all}})[0];
  std::vector<float> told;
  for (const TokenLogprob& token : heard->prompt) told.push_back(token.logprob);
  for (const float logprob : heard->logprobs()) told.push_back(logprob);
  ASSERT_EQ(told.size(), expected.size());
  for (size_t i = 0; i < told.size(); ++i) EXPECT_NEAR(told[i], expected[i], 1e-5) << i;
  EXPECT_EQ(heard->prompt[0].id, 9);
  for (const Piece& piece : heard->pieces[0]) {
    ASSERT_EQ(piece.logprob->top.size(), 2u);
    EXPECT_GE(piece.logprob->top[0].second, piece.logprob->top[1].second);
    EXPECT_GE(piece.logprob->top[0].second, piece.logprob->logprob);
  }
}

TEST_F(EngineTest, PromptsAreScoredInPartsAsAtOnce) {
  std::mt19937 random(5);
  Request wanted = request(random_ids(random, 100), 1);
  wanted.prompt_logprobs = true;
  const auto whole = alone(wanted), parts = alone(wanted, {.step_tokens = 1});
  ASSERT_EQ(parts->prompt.size(), 99u);
  for (size_t i = 0; i < 99; ++i) {
    EXPECT_EQ(parts->prompt[i].id, wanted.prompt.ids[i + 1]);
    EXPECT_EQ(parts->prompt[i].logprob, whole->prompt[i].logprob) << i;
  }
}

/// Prompts, mixtures, arrivals and parts at random: everyone gets the bits that it gets alone.
TEST_F(EngineTest, CompanyChangesNoBit) {
  model_->attach("lora", random_adapter(*model_, "lora", 1, 3, 1));
  model_->attach("wide", random_adapter(*model_, "lora", 1, 20, 2));
  model_->attach("molora", random_adapter(*model_, "molora", 3, 2, 3));
  model_->attach("top", random_adapter(*model_, "molora", 4, 1, 4, {{"top_k", 2}}));
  model_->attach("ia3", random_adapter(*model_, "ia3", 1, 1, 5));
  model_->attach("mov", random_adapter(*model_, "mov", 3, 1, 6));
  std::mt19937 random(7);
  std::vector<std::vector<double>> mixtures(5, std::vector<double>(6, 0.0));
  for (size_t i = 1; i < mixtures.size(); ++i) {
    for (double& weight : mixtures[i]) weight = random() % 2 == 0 ? 0.5 + static_cast<double>(random() % 2) : 0.0;
  }
  std::vector<Request> requests;
  const Ids shared = random_ids(random, 70);
  for (int i = 0; i < 24; ++i) {
    Ids ids = random_ids(random, 1 + static_cast<int64_t>(random() % 90));
    if (random() % 2 == 0)
      ids.insert(ids.begin(), shared.begin(), shared.begin() + static_cast<int64_t>(random() % 70));
    requests.push_back(request(ids, 1 + static_cast<int64_t>(random() % 12)));
    requests.back().prompt.mixture = mixtures[random() % mixtures.size()];
    if (random() % 3 == 0) requests.back().sampling.temperature = 1;
    requests.back().sampling.seed = random();
  }
  std::vector<std::shared_ptr<Heard>> expected, heard(requests.size());
  for (const Request& wanted : requests) expected.push_back(alone(wanted));
  int64_t reused = 0;
  for (const int64_t step : {32, 64, 1000}) {
    Engine engine(*model_, *tokenizer_, {.most_answers = 9, .kept = 6, .step_tokens = step});
    for (size_t i = 0; i < requests.size(); ++i) {
      heard[i] = std::make_shared<Heard>();
      engine.submit(requests[i], heard[i]);
      for (int steps = static_cast<int>(random() % 4); steps > 0; --steps) engine.step();
    }
    while (engine.step()) {
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(heard[i]->ids(), expected[i]->ids()) << i;
      EXPECT_EQ(heard[i]->logprobs(), expected[i]->logprobs()) << i << " in parts of " << step;
      reused += heard[i]->reused;
    }
  }
  EXPECT_GT(reused, 0) << "some prompt went on from what was kept";
}

TEST_F(EngineTest, EveryMixtureIsItsAdaptersAlone) {
  const auto lora = random_adapter(*model_, "lora", 1, 3, 1);
  model_->attach("lora", lora);
  const Ids prompt{3, 9, 4};
  Request wanted = request(prompt);
  wanted.prompt.mixture = {1.0};
  const auto with = alone(wanted);
  wanted.prompt.mixture = {0.0};
  const auto without = alone(wanted);
  wanted.prompt.mixture = {0.5};
  const auto half = alone(wanted);
  formats::TensorMap tensors = lora->folder().tensors;
  for (auto& [name, tensor] : tensors) {
    if (name.find("lora_B") != std::string::npos) tensor = tensor * 0.5;
  }
  lora->load_tensors(tensors);
  wanted.prompt.mixture = {1.0};
  EXPECT_EQ(half->logprobs(), alone(wanted)->logprobs()) << "0.5 of a delta, which is exact in binary";
  EXPECT_NE(half->logprobs(), with->logprobs());
  model_->detach("lora");
  const auto bare = alone(request(prompt));
  EXPECT_EQ(without->logprobs(), bare->logprobs());
  EXPECT_NE(with->logprobs(), bare->logprobs());
}

TEST_F(EngineTest, AdaptersComeAndGoBetweenSteps) {
  Engine engine(*model_, *tokenizer_, {.kept = 4});
  const Ids prompt{3, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
  const auto bare = alone(request(prompt, 12));
  const auto base = std::make_shared<Heard>();
  engine.submit(request(prompt, 12), base);
  engine.step();
  engine.attach("a", random_adapter(*model_, "lora", 1, 3, 1));
  engine.step();
  engine.attach("b", random_adapter(*model_, "mov", 2, 1, 2));
  Request of_b = request(prompt, 3);
  of_b.prompt.mixture = {0.0, 1.0};
  const auto b = std::make_shared<Heard>();
  engine.submit(of_b, b);
  EXPECT_FALSE(engine.detach("b"));
  EXPECT_TRUE(engine.detach("a"));
  EXPECT_THROW(engine.detach("a"), UsageError);
  while (engine.step()) {
  }
  EXPECT_EQ(base->logprobs(), bare->logprobs());
  of_b.prompt.mixture = {1.0};
  EXPECT_EQ(b->logprobs(), alone(of_b)->logprobs());
  EXPECT_NE(b->ids(), bare->ids());
  EXPECT_TRUE(engine.detach("b"));
  EXPECT_TRUE(model_->attachments().empty());
}

TEST_F(EngineTest, WhatWasReadWithAnAdapterLeavesWithIt) {
  std::mt19937 random(3);
  const Ids prompt = random_ids(random, 80);
  Engine engine(*model_, *tokenizer_, {.kept = 8});
  auto ask = [&](std::vector<double> mixture) {
    Request wanted = request(prompt, 4);
    wanted.prompt.mixture = std::move(mixture);
    const auto heard = std::make_shared<Heard>();
    engine.submit(wanted, heard);
    while (engine.step()) {
    }
    EXPECT_EQ(heard->logprobs(), alone(wanted)->logprobs());
    return heard->reused;
  };
  engine.attach("a", random_adapter(*model_, "lora", 1, 3, 1));
  ask({1.0});
  EXPECT_TRUE(engine.detach("a"));
  EXPECT_EQ(ask({}), 0) << "the base has not read it";
  engine.attach("b", random_adapter(*model_, "lora", 1, 3, 2));
  EXPECT_EQ(ask({1.0}), 0) << "another adapter has its column";
  EXPECT_EQ(ask({0.0}), 64) << "the base's text stays";
}

TEST_F(EngineTest, WhatWasReadWithOtherAdaptersOrSaltIsNotReused) {
  model_->attach("lora", random_adapter(*model_, "lora", 1, 3, 1));
  std::mt19937 random(3);
  const Ids prompt = random_ids(random, 80);
  Engine engine(*model_, *tokenizer_, {.kept = 8});
  auto ask = [&](double weight, const std::string& salt, const Ids& ids) {
    Request wanted = request(ids, 4);
    wanted.prompt.mixture = {weight};
    wanted.salt = salt;
    const auto heard = std::make_shared<Heard>();
    engine.submit(wanted, heard);
    while (engine.step()) {
    }
    EXPECT_EQ(heard->logprobs(), alone(wanted)->logprobs());
    return heard->reused;
  };
  EXPECT_EQ(ask(1, "", prompt), 0);
  EXPECT_EQ(ask(0, "", prompt), 0);
  EXPECT_EQ(ask(0.5, "", prompt), 0);
  EXPECT_EQ(ask(1, "other", prompt), 0);
  EXPECT_EQ(ask(1, "", prompt), 64) << "whole blocks of 32, and never the last token";
  Ids other = prompt;
  other[40] = other[40] == 5 ? 6 : 5;
  EXPECT_EQ(ask(1, "", other), 32);
}

TEST_F(EngineTest, ManyAnswersGoOnFromOnePrompt) {
  Request wanted = request({3, 9, 4, 11}, 6);
  wanted.sampling.temperature = 1;
  wanted.sampling.num_return_sequences = 5;
  wanted.sampling.seed = 3;
  const auto together = alone(wanted);
  const auto expected = generate(*model_, *tokenizer_, {wanted.prompt}, wanted.sampling);
  for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(together->ids(i), expected[i].ids);
  EXPECT_NE(together->ids(0), together->ids(1));
}

TEST_F(EngineTest, RequestsWaitForMemoryAndWhatIsKeptMakesRoom) {
  const int64_t token = model_->memory(0)->token_bytes();
  Engine engine(*model_, *tokenizer_, {.memory_bytes = 60 * token, .kept = 8});
  std::vector<std::shared_ptr<Heard>> heard;
  for (int i = 0; i < 4; ++i) {
    heard.push_back(std::make_shared<Heard>());
    engine.submit(request({3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18 + i}, 4), heard.back());
  }
  do {
    EXPECT_LE(engine.bytes(), 60 * token);
  } while (engine.step());
  for (const auto& each : heard) EXPECT_EQ(each->ids().size(), 4u);
  EXPECT_THROW(engine.submit(request({3, 4}, 60), heard[0]), UsageError);
}

TEST_F(EngineTest, OneThatIsCancelledOrUnwantedLeavesTheOthersAlone) {
  Engine engine(*model_, *tokenizer_, {});
  const auto stays = std::make_shared<Heard>(), goes = std::make_shared<Heard>(), stops = std::make_shared<Heard>();
  stops->most = 2;
  engine.submit(request({5, 6, 7}), stays);
  const int64_t number = engine.submit(request({8}), goes);
  engine.submit(request({9}), stops);
  engine.step();
  engine.cancel(number);
  while (engine.step()) {
  }
  EXPECT_EQ(stays->logprobs(), alone(request({5, 6, 7}))->logprobs());
  EXPECT_EQ(goes->pieces[0].size(), 1u);
  EXPECT_EQ(stops->pieces[0].size(), 2u);
}

TEST_F(EngineTest, FiguresThatAreNotFiniteEndTheirRequestAlone) {
  const auto broken = random_adapter(*model_, "lora", 1, 3, 1);
  formats::TensorMap tensors = broken->folder().tensors;
  for (auto& [name, tensor] : tensors) tensor.fill_(1e30f);
  broken->load_tensors(tensors);
  model_->attach("broken", broken);
  Engine engine(*model_, *tokenizer_, {});
  const auto good = std::make_shared<Heard>(), bad = std::make_shared<Heard>();
  Request of_base = request({5, 6, 7}), of_broken = of_base;
  of_base.prompt.mixture = {0.0};
  of_broken.prompt.mixture = {1.0};
  engine.submit(of_broken, bad);
  engine.submit(of_base, good);
  while (engine.step()) {
  }
  ASSERT_TRUE(bad->error);
  EXPECT_THROW(std::rethrow_exception(bad->error), DataError);
  EXPECT_EQ(good->logprobs(), alone(of_base)->logprobs());
}

TEST_F(EngineTest, WhatCanNotBeAnsweredIsRefusedAtOnce) {
  Engine engine(*model_, *tokenizer_, {});
  const auto heard = std::make_shared<Heard>();
  EXPECT_THROW(engine.submit(request({}), heard), UsageError);
  EXPECT_THROW(engine.submit(request({testing::kTinyVocab}), heard), DataError);
  Request beams = request({3});
  beams.sampling.num_beams = 2;
  EXPECT_THROW(engine.submit(beams, heard), UsageError);
  EXPECT_FALSE(engine.step());
}

}  // namespace
}  // namespace moesaic::generate
