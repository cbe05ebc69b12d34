#include "moesaic/eval/rank.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/adapters/adapter.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/eval/report.h"
#include "tests/generate/tiny_model.h"

namespace moesaic::eval {
namespace {

using ::testing::ElementsAre;
using testing::SentenceScales;
using testing::tiny_model;
using testing::word_tokenizer;

TEST(MakeRankQuestion, SharesTheCommonBeginning) {
  const RankQuestion question = make_rank_question(*word_tokenizer(), "w3 w4", {" w5", " w6 w7"}, true);
  EXPECT_THAT(question.prompt.ids, ElementsAre(3, 4));
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(5), ElementsAre(6, 7)));
  EXPECT_THAT(question.first_scored, ElementsAre(0, 0));
}

TEST(MakeRankQuestion, SharedWordsOfTheChoicesAreStillScored) {
  const RankQuestion question = make_rank_question(*word_tokenizer(), "w3", {" w5 w6", " w5 w7"}, true, /*eos=*/1);
  EXPECT_THAT(question.prompt.ids, ElementsAre(3));
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(5, 6, 1), ElementsAre(5, 7, 1)));
}

TEST(MakeRankQuestion, ATokenAcrossTheBorderBelongsToTheChoice) {
  // "w2" + "0" reads as w20, "w2" + " w5" as w2 w5
  const RankQuestion question = make_rank_question(*word_tokenizer(), "w3 w2", {"0", " w5"}, true);
  EXPECT_THAT(question.prompt.ids, ElementsAre(3));
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(20), ElementsAre(2, 5)));
  EXPECT_THAT(question.first_scored, ElementsAre(0, 1));  // w2 is the prompt's
}

TEST(MakeRankQuestion, BlanksThatEndThePromptAreScored) {
  Json file = Json::parse(word_tokenizer()->json());
  file["pre_tokenizer"] = Json::parse(R"({"type": "Split", "pattern": {"Regex": "\\s|\\S+"}, "behavior": "Isolated",
                                          "invert": false})");
  file["model"]["vocab"]["\n"] = 23;
  file["model"]["vocab"].erase("w23");
  const tokenizer::Tokenizer lines(file.dump(), word_tokenizer()->config(), "lines");
  const RankQuestion question = make_rank_question(lines, "w3\n", {"w5", "w6"}, false);
  EXPECT_THAT(question.prompt.ids, ElementsAre(3));
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(23, 5), ElementsAre(23, 6)));
  EXPECT_THAT(question.first_scored, ElementsAre(0, 0));
  EXPECT_THAT(question.first_of_choice, ElementsAre(1, 1));
}

TEST(MakeRankQuestion, AnEmptyPromptGetsTheFirstToken) {
  const RankQuestion question = make_rank_question(*word_tokenizer(), "", {"w5", "w6"}, true);
  EXPECT_THAT(question.prompt.ids, ElementsAre(0));
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(5), ElementsAre(6)));
}

TEST(MakeRankQuestion, AnEosOfTheTokenizersOwnIsNoPartOfTheChoice) {
  const auto plain = word_tokenizer();
  Json file = Json::parse(plain->json());
  file["post_processor"] = Json::parse(R"({"type": "TemplateProcessing", "pair": [],
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "w1", "type_id": 0}}],
    "special_tokens": {"w1": {"id": "w1", "ids": [1], "tokens": ["w1"]}}})");
  const tokenizer::Tokenizer closing(file.dump(), plain->config(), "closing");
  ASSERT_THAT(closing.encode("w3", true), ElementsAre(3, 1));
  const RankQuestion question = make_rank_question(closing, "w3", {" w5", " w6 w7"}, true);
  EXPECT_THAT(question.choices, ElementsAre(ElementsAre(5), ElementsAre(6, 7)));
}

std::vector<RankQuestion> some_questions() {
  std::vector<RankQuestion> questions;
  questions.push_back({{{3, 4, 5}}, {{6}, {7, 8, 9}}, {0, 0}, {0, 0}});
  questions.push_back({{{10}}, {{11, 12}, {13}, {14, 15, 16}}, {0, 0, 0}, {0, 0, 0}});
  questions.push_back({{{2, 20, 21, 22, 23}}, {{5}, {6}}, {0, 0}, {0, 0}});
  questions.push_back({{{17, 18}}, {{19, 3}, {19, 4}}, {1, 0}, {1, 0}});
  return questions;
}

TEST(MakeRankQuestion, APromptThatStandsApartIsNotReadWithItsChoices) {
  const auto words = word_tokenizer();
  const tokenizer::Tokenizer apart(words->json(), words->config(), "words", /*prompts_apart=*/true);
  const RankQuestion question = make_rank_question(apart, "w3 w4", {"w5", "w6 w7"}, true, /*eos=*/1);
  EXPECT_EQ(question.prompt.ids, apart.encode("w3 w4", true));
  auto with_eos = [&](const char* text) {
    std::vector<int64_t> ids = apart.encode(text, false);
    ids.push_back(1);
    return ids;
  };
  EXPECT_EQ(question.choices, (std::vector{with_eos("w5"), with_eos("w6 w7")}));
  EXPECT_EQ(question.first_scored, (std::vector<int64_t>{0, 0}));  // all of a choice is its own
  EXPECT_EQ(question.first_of_choice, (std::vector<int64_t>{0, 0}));
}

TEST(Rank, SumsLogProbabilitiesOfTheScoredTokens) {
  auto model = tiny_model();
  const std::vector<RankQuestion> questions = some_questions();
  const auto scores = rank(*model, questions);
  for (size_t q = 0; q < questions.size(); ++q) {
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      std::vector<int64_t> whole = questions[q].prompt.ids;
      whole.insert(whole.end(), questions[q].choices[c].begin(), questions[q].choices[c].end());
      const std::vector<float> logprobs = generate::score(*model, {{whole}})[0];
      const size_t first = questions[q].prompt.ids.size() + questions[q].first_scored[c];
      const double expected = std::accumulate(logprobs.begin() + (first - 1), logprobs.end(), 0.0);
      EXPECT_NEAR(scores[q][c].logprob, expected, 1e-4) << q << " " << c;
    }
  }
}

TEST(Rank, UnderDynamicRopeEveryChoiceIsReadAtOnce) {
  const std::vector<RankQuestion> questions = some_questions();
  for (const int64_t original : {2, 4, 5, 64}) {
    const auto model = testing::dynamic_model(original);
    const auto scores = rank(*model, questions);
    for (size_t q = 0; q < questions.size(); ++q) {
      for (size_t c = 0; c < questions[q].choices.size(); ++c) {
        // As lm-evaluation-harness: the last token is no part of what is read.
        std::vector<int64_t> whole = questions[q].prompt.ids;
        whole.insert(whole.end(), questions[q].choices[c].begin(), questions[q].choices[c].end());
        const models::Text text{nn::RaggedBatch::from_sequences({{whole.begin(), whole.end() - 1}})};
        nn::Pass pass;
        const torch::Tensor log_probs = model->head().logits(model->hidden(text, pass)).log_softmax(-1);
        double expected = 0;
        for (size_t i = questions[q].prompt.ids.size() + questions[q].first_scored[c]; i < whole.size(); ++i) {
          expected += log_probs[static_cast<int64_t>(i) - 1][whole[i]].item<double>();
        }
        EXPECT_NEAR(scores[q][c].logprob, expected, 1e-4) << original << " " << q << " " << c;
      }
    }
  }
}

TEST(Rank, UnderDynamicRopeASentenceIsThePrompts) {
  const auto model = testing::dynamic_model(2);
  SentenceScales::attach(*model);
  std::vector<RankQuestion> questions = some_questions();
  for (size_t q = 0; q < 4; ++q) questions[q].prompt.sentence = {static_cast<float>(q) - 1.5f};
  std::vector<std::vector<int64_t>> passes;
  const auto scores =
      rank(*model, questions, [&](const auto&, const std::vector<int64_t>& of) { passes.push_back(of); });
  for (size_t q = 0; q < 4; ++q) {
    const auto alone = rank(*model, {questions[q]});
    for (size_t c = 0; c < alone[0].size(); ++c) {
      EXPECT_NEAR(scores[q][c].logprob, alone[0][c].logprob, 1e-4) << q << " " << c;
    }
  }
  EXPECT_THAT(passes, ElementsAre(ElementsAre(0, 0, 1, 1, 1, 2, 2, 3, 3)));
}

TEST(Rank, GreedyChoiceIsMarked) {
  auto model = tiny_model();
  const auto answer = generate::generate(*model, *word_tokenizer(), {{{3, 4, 5}}}, {.max_new_tokens = 3})[0].ids;
  std::vector<int64_t> other = answer;
  other[1] = (other[1] + 1) % testing::kTinyVocab;
  const auto scores = rank(*model, {{{{3, 4, 5}}, {answer, other}, {0, 0}, {0, 0}}});
  EXPECT_TRUE(scores[0][0].is_greedy);
  EXPECT_FALSE(scores[0][1].is_greedy);
  // Another first token, then what greedy decoding says behind it: only the first is not greedy.
  const int64_t first = (answer[0] + 1) % testing::kTinyVocab;
  const auto then = generate::generate(*model, *word_tokenizer(), {{{3, 4, 5, first}}}, {.max_new_tokens = 1})[0].ids;
  EXPECT_FALSE(rank(*model, {{{{3, 4, 5}}, {{first, then[0]}, answer}, {0, 0}, {0, 0}}})[0][0].is_greedy);
}

TEST(Rank, EveryChoiceIsReadWithTheSentenceOfItsQuestion) {
  auto model = tiny_model();
  SentenceScales::attach(*model);
  std::vector<RankQuestion> questions = some_questions();
  const std::vector<float> sentences{1.0f, -2.0f, 3.0f, 0.5f};
  for (size_t q = 0; q < 4; ++q) questions[q].prompt.sentence = {sentences[q]};
  std::vector<std::vector<int64_t>> passes;
  const auto scores =
      rank(*model, questions, [&](const auto&, const std::vector<int64_t>& of) { passes.push_back(of); });
  for (int64_t q = 0; q < 4; ++q) {
    const auto alone = rank(*model, {questions[q]});
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      EXPECT_NEAR(scores[q][c].logprob, alone[0][c].logprob, 1e-4) << q << " " << c;
    }
  }
  // All prompts, then the choices of more than one token.
  EXPECT_THAT(passes, ElementsAre(ElementsAre(0, 1, 2, 3), ElementsAre(0, 1, 1, 3, 3)));
}

/// Two mixtures of different numbers of experts under their names.
std::shared_ptr<models::CausalLM> with_two_mixtures() {
  auto model = tiny_model();
  for (const int64_t experts : {4, 8}) {
    adapters::AdapterConfig config;
    config.method = "molora";
    config.num_experts = experts;
    config.lora_rank = 2;
    config.targets = std::vector<std::string>{"q_proj", "down_proj"};
    const auto adapter = adapters::Adapter::create(config, model->sites(), torch::kCPU, 5);
    torch::NoGradGuard no_grad;
    torch::manual_seed(experts);
    for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0, 0.3);
    model->attach(fmt::format("a{}", experts), adapter);
  }
  return model;
}

TEST(Rank, QuestionsHaveTheirOwnMixtures) {
  const auto model = with_two_mixtures();
  std::vector<RankQuestion> questions = some_questions();
  questions[0].prompt.mixture = {1, 0};
  questions[1].prompt.mixture = {0, 0};
  questions[3].prompt.mixture = {-0.5, 2};
  const auto together = rank(*model, questions);
  const auto base = rank(*tiny_model(), {some_questions()[1]});
  for (size_t q = 0; q < questions.size(); ++q) {
    const auto alone = rank(*model, {questions[q]});
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      EXPECT_NEAR(together[q][c].logprob, alone[0][c].logprob, 1e-4) << q << " " << c;
      if (q == 1) EXPECT_NEAR(together[q][c].logprob, base[0][c].logprob, 1e-4) << "weights 0 are the base";
    }
  }
}

TEST(FirstLargest, TiesGoToTheFirstAndAreReported) {
  EXPECT_EQ(first_largest({-3, -1, -2}).index, 1u);
  EXPECT_FALSE(first_largest({-3, -1, -2}).tied);
  EXPECT_EQ(first_largest({-3, -1, -1}).index, 1u);
  EXPECT_TRUE(first_largest({-3, -1, -1}).tied);
  EXPECT_FALSE(first_largest({-1, -1, 0}).tied);  // the tie was not for the first place
}

Item question(const std::string& prompt, std::vector<std::string> choices, const std::string& target,
              const std::string& variant = "") {
  Item item;
  item.doc = {{"inputs", prompt}};
  item.messages = OrderedJson::array();
  item.messages.push_back({{"role", "user"}, {"content", prompt}});
  item.choices = std::move(choices);
  item.targets = {target};
  item.variant = variant;
  return item;
}

Task ranked_task() {
  Task task{"words", "words.jsonl", {}, 7};
  const std::vector<std::vector<std::string>> choices{{"w5", "w6 w7"}, {"w8", "w9", "w10"}, {"w3 w4 w5", "w6"}};
  for (int i = 0; i < 7; ++i) {
    std::string prompt;
    for (int w = 0; w <= i; ++w) prompt += fmt::format("w{} ", 3 + (i * 5 + w) % 20);
    prompt.pop_back();
    task.items.push_back(question(prompt, choices[i % 3], choices[i % 3][i % 2], i % 2 ? "odd" : "even"));
  }
  return task;
}

/// Log-likelihoods of every choice, from the sample log.
std::vector<double> logged(const TaskResult& result) {
  std::vector<double> values;
  for (const OrderedJson& sample : result.samples) {
    for (const OrderedJson& response : sample["filtered_resps"]) values.push_back(response[0].get<double>());
  }
  return values;
}

TEST(Evaluate, ScoresDoNotDependOnTheBatchSize) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  const EvalModel view{*model, *tokenizer};
  const TaskResult one = evaluate(view, ranked_task(), {.batch_size = 1});
  for (int64_t batch : {2, 7, 0}) {
    const TaskResult many = evaluate(view, ranked_task(), {.batch_size = batch});
    const std::vector<double> a = logged(one), b = logged(many);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-4) << "batch " << batch;
    EXPECT_EQ(one.metrics.at("acc").value, many.metrics.at("acc").value);
  }
}

TEST(Evaluate, SumAndCharacterNormalisedAccuracyCanDiffer) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  const EvalModel view{*model, *tokenizer};
  // The same word four times against once: fewer tokens win the sum; per character the better mean wins.
  Task task{"t", "t", {question("w3", {"w4", "w5 w5 w5 w5 w5 w5"}, "w4")}, 1};
  const TaskResult result = evaluate(view, task, {});
  const std::vector<double> scores = logged(result);
  const bool sum_first = scores[0] >= scores[1];
  const bool mean_first = scores[0] / 2 >= scores[1] / 17;  // characters
  EXPECT_EQ(result.metrics.at("acc").value, sum_first ? 1 : 0);
  EXPECT_EQ(result.metrics.at("acc_norm").value, mean_first ? 1 : 0);
  EXPECT_TRUE(sum_first);
  EXPECT_FALSE(mean_first) << "choose words for which the two rules disagree";
}

TEST(Evaluate, RoutingIsCountedByOwner) {
  const auto model = with_two_mixtures();
  auto tokenizer = word_tokenizer();
  Task generated{"g", "g", {question("w3 w4", {}, "w5"), question("w6", {}, "w7")}, 2};
  EvalOptions options;
  options.generation.max_new_tokens = 3;
  for (const Task& task : {ranked_task(), generated}) {
    const OrderedJson routing = evaluate({*model, *tokenizer}, task, options).routing.json();
    for (const auto& [owner, experts] : {std::pair("a4", 4u), {"a8", 8u}}) {
      ASSERT_EQ(routing[owner].size(), 4u) << "two sites in two layers";
      for (const auto& [site, figures] : routing[owner].items()) {
        ASSERT_EQ(figures["mean_prob"].size(), experts) << owner << site;
        const auto mean = figures["mean_prob"].get<std::vector<double>>();
        EXPECT_NEAR(std::accumulate(mean.begin(), mean.end(), 0.0), 1.0, 1e-4) << owner << site;
      }
    }
  }
  EXPECT_TRUE(evaluate({*tiny_model(), *tokenizer}, ranked_task(), {}).routing.empty());
}

TEST(Evaluate, EqualChoicesAreATie) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  Task task{"t", "t", {question("w3", {"w4", "w4"}, "w4")}, 1};
  const TaskResult result = evaluate({*model, *tokenizer}, task, {});
  EXPECT_EQ(result.ties, 1);
  EXPECT_EQ(result.samples[0]["tie"], true);
}

TEST(Evaluate, ScoringEosAddsIt) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  Task task{"t", "t", {question("w3", {"w4", "w5 w6"}, "w4")}, 1};
  const std::vector<double> scores = logged(evaluate({*model, *tokenizer}, task, {.score_eos = true}));
  const std::vector<float> expected = generate::score(*model, {{{3, 4, 1}}})[0];
  EXPECT_NEAR(scores[0], expected[0] + expected[1], 1e-4);
}

TEST(Evaluate, GeneratedAnswersAreScored) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  const auto answer = generate::generate(*model, *tokenizer, {{{3, 4}}}, {.max_new_tokens = 3})[0];
  Task task{"t", "t", {question("w3 w4", {}, answer.text), question("w3 w4", {}, "nothing")}, 2};
  EvalOptions options;
  options.generation.max_new_tokens = 3;
  const TaskResult result = evaluate({*model, *tokenizer}, task, options);
  EXPECT_EQ(result.metrics.at("exact_match").value, 0.5);
  EXPECT_EQ(result.metrics.at("f1").value, 0.5);
  EXPECT_EQ(result.metrics.at("rougeL").value, 0.5);
}

TEST(Evaluate, ConversationsNeedATemplate) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  Task task = ranked_task();
  EXPECT_THROW(evaluate({*model, *tokenizer}, task, {.apply_chat_template = true}), UsageError);
  task.items[0].messages.push_back({{"role", "assistant"}, {"content", "w3"}});
  EXPECT_THROW(evaluate({*model, *tokenizer}, task, {}), UsageError);
}

TEST(ResultsJson, HasTheHarnessShape) {
  auto model = tiny_model();
  auto tokenizer = word_tokenizer();
  const std::vector<Task> tasks{ranked_task()};
  const std::vector<TaskResult> results{evaluate({*model, *tokenizer}, tasks[0], {})};
  const OrderedJson json = results_json(results, tasks, {}, {.version = "1", .model = "a/b", .limit = 7});
  const double acc = json["results"]["words"]["acc,none"];
  EXPECT_NEAR(acc, results[0].metrics.at("acc").value, 1e-12);
  for (const char* key :
       {"alias", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none", "acc_template_median,none"}) {
    EXPECT_TRUE(json["results"]["words"].contains(key)) << key;
  }
  for (const char* key :
       {"group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "git_hash",
        "date", "task_hashes", "model_source", "model_name", "model_name_sanitized", "chat_template",
        "chat_template_sha", "system_instruction", "total_evaluation_time_seconds"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["model_name_sanitized"], "a__b");
  EXPECT_EQ(json["n-samples"]["words"], OrderedJson::parse(R"({"original": 7, "effective": 7})"));
  EXPECT_EQ(json["configs"]["words"]["output_type"], "multiple_choice");
  EXPECT_EQ(json["variants"]["words"].size(), 2u);
  const OrderedJson& sample = results[0].samples[0];
  for (const char* key : {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics",
                          "doc_hash", "prompt_hash", "target_hash", "acc", "acc_norm"}) {
    EXPECT_TRUE(sample.contains(key)) << key;
  }
  EXPECT_EQ(sample["arguments"]["gen_args_0"], OrderedJson::parse(R"({"arg_0": "w3", "arg_1": " w5"})"));
  EXPECT_EQ(sample["resps"].size(), 2u);
  EXPECT_TRUE(sample["resps"][0][0][1].is_boolean());
}

}  // namespace
}  // namespace moesaic::eval
