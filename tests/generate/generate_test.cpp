#include "moesaic/generate/generate.h"

#include <gtest/gtest.h>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/generate/sampling.h"
#include "tests/generate/tiny_model.h"

namespace moesaic::generate {
namespace {

using testing::SentenceScales;
using testing::tiny_model;
using testing::word_tokenizer;
using Ids = std::vector<int64_t>;

/// Logits of every row by one full forward pass without a cache.
torch::Tensor full_logits(models::CausalLM& model, const Ids& ids) {
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  return model.head().logits(model.hidden({nn::RaggedBatch::from_sequences({ids})}, pass));
}

Ids greedy_by_full_passes(models::CausalLM& model, Ids ids, int64_t tokens) {
  Ids answer;
  for (int64_t i = 0; i < tokens; ++i) {
    answer.push_back(full_logits(model, ids)[-1].argmax().item<int64_t>());
    ids.push_back(answer.back());
  }
  return answer;
}

class Generate : public ::testing::Test {
 protected:
  std::shared_ptr<models::CausalLM> model_ = tiny_model();
  std::shared_ptr<tokenizer::Tokenizer> tokenizer_ = word_tokenizer();
  const std::vector<Prompt> prompts_{{{5, 6, 7}}, {{8}}, {{3, 9, 4, 11, 12, 20, 21}}};
};

TEST_F(Generate, GreedyEqualsFullPassesInARaggedBatch) {
  const auto answers = generate(*model_, *tokenizer_, prompts_, {.max_new_tokens = 12});
  for (size_t i = 0; i < prompts_.size(); ++i) {
    EXPECT_EQ(answers[i].ids, greedy_by_full_passes(*model_, prompts_[i].ids, 12));
    EXPECT_EQ(answers[i].finish_reason, "length");
  }
}

TEST_F(Generate, AnswersDoNotDependOnNeighbours) {
  const SamplingOptions options{.max_new_tokens = 10, .temperature = 1.0, .top_k = 12, .seed = 3};
  const auto together = generate(*model_, *tokenizer_, prompts_, options);
  for (size_t i = 0; i < prompts_.size(); ++i) {
    SamplingOptions own = options;
    own.first = static_cast<int64_t>(i);
    EXPECT_EQ(generate(*model_, *tokenizer_, {prompts_[i]}, own)[0].ids, together[i].ids);
  }
}

TEST_F(Generate, NeighbouringSeedsShareNoAnswers) {
  const std::vector<Prompt> prompts(6, prompts_[0]);
  SamplingOptions options{.max_new_tokens = 12, .temperature = 1.0, .seed = 0};
  const auto first = generate(*model_, *tokenizer_, prompts, options);
  options.seed = 1;
  const auto second = generate(*model_, *tokenizer_, prompts, options);
  for (const Generation& a : first) {
    for (const Generation& b : second) EXPECT_NE(a.ids, b.ids);
  }
}

TEST_F(Generate, EosEndsOneSequenceAndTheOthersGoOn) {
  const auto plain = generate(*model_, *tokenizer_, prompts_, {.max_new_tokens = 10});
  const int64_t eos = plain[0].ids[2];
  const auto stopped = generate(*model_, *tokenizer_, prompts_, {.max_new_tokens = 10, .eos_ids = {eos}});
  for (size_t i = 0; i < prompts_.size(); ++i) {
    const auto end = std::find(plain[i].ids.begin(), plain[i].ids.end(), eos);
    Ids expected(plain[i].ids.begin(), end == plain[i].ids.end() ? end : end + 1);
    EXPECT_EQ(stopped[i].ids, expected);
    EXPECT_EQ(stopped[i].finish_reason, end == plain[i].ids.end() ? "length" : "stop");
  }
  EXPECT_EQ(stopped[0].finish_reason, "stop");
  EXPECT_EQ(stopped[0].text.find("w" + std::to_string(eos)), std::string::npos) << "EOS is no part of the text";
}

TEST_F(Generate, StreamedPiecesMakeTheText) {
  std::vector<std::string> streamed(prompts_.size());
  const auto answers =
      generate(*model_, *tokenizer_, prompts_, {.max_new_tokens = 6}, {[&](int64_t i, const std::string& piece) {
        streamed[i] += piece;
        return true;
      }});
  for (size_t i = 0; i < prompts_.size(); ++i) {
    EXPECT_EQ(streamed[i], answers[i].text);
    EXPECT_EQ(answers[i].text, tokenizer_->decode(answers[i].ids, true));
  }
}

TEST_F(Generate, AStopStringEndsTheAnswerAndIsCutFromIt) {
  const Generation plain = generate(*model_, *tokenizer_, {prompts_[2]}, {.max_new_tokens = 8})[0];
  // The stop spans the border of the third and fourth token.
  const std::string before = tokenizer_->decode({plain.ids.begin(), plain.ids.begin() + 3}, true);
  const std::string through = tokenizer_->decode({plain.ids.begin(), plain.ids.begin() + 4}, true);
  const std::string stop = through.substr(before.size() - 1);
  const size_t at = plain.text.find(stop);
  std::string streamed;
  const Generation stopped = generate(*model_, *tokenizer_, {prompts_[2]}, {.max_new_tokens = 8, .stop = {stop}},
                                      {[&](int64_t, const std::string& piece) {
                                        streamed += piece;
                                        return true;
                                      }})[0];
  EXPECT_EQ(stopped.text, plain.text.substr(0, at));
  EXPECT_EQ(streamed, stopped.text);
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_LE(stopped.ids.size(), 4u);
}

TEST_F(Generate, TheCallbackCanStopItsSequence) {
  const auto answers = generate(*model_, *tokenizer_, prompts_, {.max_new_tokens = 6},
                                {[](int64_t i, const std::string&) { return i != 1; }});
  EXPECT_LE(answers[1].ids.size(), 2u);
  EXPECT_EQ(answers[1].finish_reason, "stop");
  EXPECT_EQ(answers[0].ids.size(), 6u);
}

TEST_F(Generate, ThePenaltySeesPromptAndAnswer) {
  const SamplingOptions options{.max_new_tokens = 8, .repetition_penalty = 5.0};
  for (const Prompt& prompt : prompts_) {
    Ids seen = prompt.ids;
    for (int64_t i = 0; i < options.max_new_tokens; ++i) {
      torch::Tensor logits = full_logits(*model_, seen)[-1].contiguous();
      apply_repetition_penalty({logits.data_ptr<float>(), static_cast<size_t>(logits.numel())}, seen, 5.0);
      seen.push_back(logits.argmax().item<int64_t>());
    }
    EXPECT_EQ(generate(*model_, *tokenizer_, {prompt}, options)[0].ids,
              Ids(seen.begin() + std::ssize(prompt.ids), seen.end()));
  }
}

TEST_F(Generate, SentencesAndRoutingFollowTheAnswersThatGoOn) {
  SentenceScales::attach(*model_);
  std::vector<Prompt> prompts = prompts_;
  const std::vector<float> sentences{1.0f, -2.0f, 3.0f};
  for (size_t i = 0; i < 3; ++i) prompts[i].sentence = {sentences[i]};
  SamplingOptions options{.max_new_tokens = 8};
  options.eos_ids = {generate(*model_, *tokenizer_, {prompts[0]}, options)[0].ids[1]};
  std::vector<Ids> numbers;
  const auto together = generate(*model_, *tokenizer_, prompts, options,
                                 {nullptr, [&](const auto&, const Ids& sequences) { numbers.push_back(sequences); }});
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(together[i].ids, generate(*model_, *tokenizer_, {prompts[i]}, options)[0].ids) << i;
    // Every token of an answer but the last is run through the model, and the prompt once before.
    const auto runs =
        std::count_if(numbers.begin(), numbers.end(), [&](const Ids& n) { return std::count(n.begin(), n.end(), i); });
    EXPECT_EQ(runs, static_cast<int64_t>(together[i].ids.size())) << i;
  }
  EXPECT_LT(together[0].ids.size(), together[2].ids.size()) << "the first must end before the last";

  // A session's memory belongs to the sentence it was made with.
  Session session(*model_, *tokenizer_);
  session.answer({prompts[2].ids, {1.0f}}, options);
  EXPECT_EQ(session.answer(prompts[2], options).ids, together[2].ids);
  EXPECT_EQ(session.reused(), 0);

  EXPECT_THROW(generate(*model_, *tokenizer_, prompts_, options), UsageError) << "no column gives a sentence";
}

/// The request as a router: each row has its own weights over the attached adapters.
class Mixtures : public Generate {
 protected:
  Mixtures() {
    for (const char* name : {"first", "second"}) attach(*model_, name);
  }
  static void attach(models::CausalLM& model, const std::string& name) {
    adapters::AdapterConfig config;
    config.method = name == "first" ? "molora" : "lora";
    config.num_experts = name == "first" ? 3 : 1;
    config.lora_rank = 2;
    config.targets = std::vector<std::string>{"q_proj", "v_proj", "down_proj"};
    const auto adapter = adapters::Adapter::create(config, model.sites(), torch::kCPU, 5);
    torch::NoGradGuard no_grad;
    torch::manual_seed(name == "first" ? 6 : 7);
    for (const auto& parameter : adapter->parameters()) {
      parameter.tensor.copy_(torch::randn_like(parameter.tensor) * 0.3);
    }
    model.attach(name, adapter);
  }
};

TEST_F(Mixtures, InOneBatchEqualOneByOne) {
  std::vector<Prompt> prompts = prompts_;
  prompts.push_back(prompts_[0]);
  prompts[0].mixture = {1, 0};
  prompts[1].mixture = {0, 1};
  prompts[2].mixture = {0.3, -1.5};
  prompts[3].mixture = {0, 0};
  const SamplingOptions options{.max_new_tokens = 10};
  const auto together = generate(*model_, *tokenizer_, prompts, options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(together[i].ids, generate(*model_, *tokenizer_, {prompts[i]}, options)[0].ids) << i;
  }
  // One-hot is the model with that adapter alone; nothing is the base.
  const auto alone = tiny_model(), base = tiny_model();
  attach(*alone, "second");
  EXPECT_EQ(together[1].ids, generate(*alone, *tokenizer_, {prompts_[1]}, options)[0].ids);
  EXPECT_EQ(together[3].ids, generate(*base, *tokenizer_, {prompts_[0]}, options)[0].ids);
  EXPECT_NE(together[0].ids, together[3].ids);
}

TEST_F(Mixtures, WeightsForOtherAdaptersAreRefused) {
  Prompt prompt = prompts_[0];
  prompt.mixture = {1};
  EXPECT_THROW(generate(*model_, *tokenizer_, {prompt}, {.max_new_tokens = 2}), UsageError);
  EXPECT_THROW(model_->column("third"), UsageError);
  EXPECT_EQ(model_->column("second"), 1);
}

TEST_F(Mixtures, ASessionWithOtherWeightsBeginsAnew) {
  const SamplingOptions options{.max_new_tokens = 6};
  Session session(*model_, *tokenizer_);
  Prompt prompt = prompts_[2];
  session.answer(prompt, options);
  for (const std::vector<double>& weights : {std::vector{0.0, 1.0}, {-1.0, 0.5}, {}}) {
    prompt.mixture = weights;
    EXPECT_EQ(session.answer(prompt, options).ids, generate(*model_, *tokenizer_, {prompt}, options)[0].ids);
    EXPECT_EQ(session.reused(), 0);
    session.answer(prompt, options);
    EXPECT_EQ(session.reused(), std::ssize(prompt.ids) - 1);
  }
}

TEST_F(Mixtures, ASequenceThatBeginsAgainForgetsItsWeights) {
  const torch::NoGradGuard no_grad;
  const auto memory = model_->memory(1);
  auto last = [&](const torch::Tensor& mixture, models::Memory* kept) {
    models::Text text{nn::RaggedBatch::from_sequences({prompts_[0].ids})};
    text.mixture = mixture;
    nn::Pass pass;
    return model_->head().logits(model_->hidden(text, pass, kept));
  };
  const auto weighed = last(torch::tensor({{0.0f, 1.0f}}), memory.get());
  memory->truncate(0, 0);
  const auto whole = last({}, memory.get());
  EXPECT_LT((whole - last({}, nullptr)).abs().max().item<double>(), 1e-5);
  EXPECT_GT((whole - weighed).abs().max().item<double>(), 1e-2);
}

/// A router that reads the mean of the frozen model's states over the whole prompt.
TEST_F(Generate, SentenceEmbeddingsAreThoseOfEachPrompt) {
  adapters::AdapterConfig config;
  config.method = "molora";
  config.num_experts = 3;
  config.lora_rank = 2;
  config.targets = std::vector<std::string>{"q_proj", "v_proj", "down_proj"};
  config.router.input = "sentence";
  const auto adapter = adapters::Adapter::create(config, model_->sites(), torch::kCPU, 5);
  {
    torch::NoGradGuard no_grad;
    torch::manual_seed(8);
    for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0, 0.5);
  }
  model_->attach("mixture", adapter);
  const SamplingOptions options{.max_new_tokens = 8};
  const auto together = generate(*model_, *tokenizer_, prompts_, options);
  for (size_t i = 0; i < prompts_.size(); ++i) {
    EXPECT_EQ(together[i].ids, generate(*model_, *tokenizer_, {prompts_[i]}, options)[0].ids) << i;
  }
  Session session(*model_, *tokenizer_);
  session.answer(prompts_[2], options);
  Prompt longer = prompts_[2];
  longer.ids.push_back(9);
  EXPECT_EQ(session.answer(longer, options).ids, generate(*model_, *tokenizer_, {longer}, options)[0].ids);
  EXPECT_EQ(session.reused(), 0) << "a longer prompt has another mean";
}

TEST_F(Generate, SequencesJoinARunningBatch) {
  torch::NoGradGuard no_grad;
  const auto memory = model_->memory(1);
  auto last = [&](const std::vector<Ids>& step) {
    nn::Pass pass;
    const auto batch = nn::RaggedBatch::from_sequences(step);
    const auto logits = model_->head().logits(model_->hidden({batch}, pass, memory.get()));
    std::vector<int64_t> next;
    for (int64_t b = 0; b < batch.batch_size(); ++b) {
      next.push_back(logits[batch.offsets[b + 1] - 1].argmax().item<int64_t>());
    }
    return next;
  };
  Ids first{last({prompts_[0].ids})};
  memory->add(1);
  const Ids both = last({{first[0]}, prompts_[2].ids});
  memory->keep({1});
  const Ids third = last({{both[1]}});
  EXPECT_EQ((Ids{first[0], both[0]}), greedy_by_full_passes(*model_, prompts_[0].ids, 2));
  EXPECT_EQ((Ids{both[1], third[0]}), greedy_by_full_passes(*model_, prompts_[2].ids, 2));
}

TEST_F(Generate, AStopStringMayEndInTheLastHalfCharacter) {
  // Every id is the first byte of a character that never goes on: decoded as U+FFFD when the answer ends.
  Json vocab = Json::object();
  for (int64_t i = 0; i < testing::kTinyVocab; ++i) vocab[fmt::format("<0x{:02X}>", 0xC3 + i)] = i;
  const Json file = {
      {"version", "1.0"},
      {"added_tokens", Json::array()},
      {"decoder", {{"type", "ByteFallback"}}},
      {"model", {{"type", "BPE"}, {"byte_fallback", true}, {"merges", Json::array()}, {"vocab", vocab}}}};
  const tokenizer::Tokenizer bytes(file.dump(), Json::object(), "bytes");
  const Generation answer = generate(*model_, bytes, {prompts_[0]}, {.max_new_tokens = 1, .stop = {"\xEF\xBF\xBD"}})[0];
  EXPECT_EQ(answer.text, "");
  EXPECT_EQ(answer.finish_reason, "stop");
}

TEST_F(Generate, BadPromptsAreRefused) {
  EXPECT_THROW(generate(*model_, *tokenizer_, {Prompt{}}, {}), UsageError);
  EXPECT_THROW(generate(*model_, *tokenizer_, {{{testing::kTinyVocab}}}, {}), DataError);
}

TEST_F(Generate, ASessionReusesWhatItHasSeen) {
  Session session(*model_, *tokenizer_);
  const SamplingOptions options{.max_new_tokens = 5};
  const Ids first = session.answer(prompts_[2], options).ids;
  EXPECT_EQ(session.reused(), 0);
  Ids second = prompts_[2].ids;
  second.insert(second.end(), first.begin(), first.end());
  second.insert(second.end(), {14, 15});
  const Ids answer = session.answer({second}, options).ids;
  // 7 prompt tokens and the first 4 of the answer: the fifth was never run through the model.
  EXPECT_EQ(session.reused(), 11);
  EXPECT_EQ(answer, greedy_by_full_passes(*model_, second, 5));
  // Another beginning: only what is equal stays.
  Ids third = second;
  third[4] = 2;
  EXPECT_EQ(session.answer({third}, options).ids, greedy_by_full_passes(*model_, third, 5));
  EXPECT_EQ(session.reused(), 4);
  // The same prompt again: its last token is computed for its logits.
  EXPECT_EQ(session.answer({third}, options).ids, greedy_by_full_passes(*model_, third, 5));
  EXPECT_EQ(session.reused(), static_cast<int64_t>(third.size()) - 1);
}

TEST_F(Generate, ASessionUnderDynamicRopeBeginsAnewBehindTheOriginalLength) {
  const auto model = testing::dynamic_model(/*original=*/9);
  Session session(*model, *tokenizer_);
  const SamplingOptions options{.max_new_tokens = 2};
  auto expect = [&](const Ids& ids, int64_t reused) {
    EXPECT_EQ(session.answer({ids}, options).ids, generate(*model, *tokenizer_, {{ids}}, options)[0].ids);
    EXPECT_EQ(session.reused(), reused);
  };
  expect({3, 4, 5, 6}, 0);
  expect({3, 4, 5, 6, 7, 8}, 4);
  expect({3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 0);  // longer
  expect({3, 4, 5, 6}, 0);                       // the keys it holds are a longer text's
}

TEST_F(Generate, ScoresAreLogProbabilitiesOfTheNextToken) {
  const auto scores = score(*model_, prompts_);
  EXPECT_TRUE(scores[1].empty());  // a single token has nothing before it
  for (size_t i : {0, 2}) {
    const torch::Tensor expected = full_logits(*model_, prompts_[i].ids).log_softmax(1);
    ASSERT_EQ(scores[i].size(), prompts_[i].ids.size() - 1);
    for (size_t t = 0; t + 1 < prompts_[i].ids.size(); ++t) {
      EXPECT_NEAR(scores[i][t], expected[t][prompts_[i].ids[t + 1]].item<float>(), 1e-5);
    }
  }
}

}  // namespace
}  // namespace moesaic::generate
