#include "moesaic/train/trainer.h"
#include "moesaic/models/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/train/checkpoint.h"
#include "moesaic/train/memory.h"
#include "tests/temporary_folder.h"
#include "tiny_run.h"

namespace moesaic::train {
namespace {

using test::TemporaryFolder;
namespace fs = std::filesystem;
using testing::HasSubstr;

TrainConfig quick_config(int64_t steps = 4) {
  TrainConfig config;
  config.per_device_train_batch_size = 4;
  config.max_steps = steps;
  config.learning_rate = 1e-2;
  config.logging_steps = 2;
  config.save_steps = 0;
  return config;
}

/// Updates in proportion to the gradient instead of its sign, so that rounding stays rounding.
TrainConfig smooth_config(int64_t steps) {
  TrainConfig config = quick_config(steps);
  config.adam_epsilon = 1.0;
  config.learning_rate = 1.0;
  return config;
}

std::vector<Json> read_lines(const fs::path& path) {
  std::vector<Json> rows;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) rows.push_back(Json::parse(line));
  return rows;
}

double difference(const torch::Tensor& a, const torch::Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(Trainer, LearnsAFewExamplesByHeart) {
  for (const char* optim : {"adamw", "adafactor"}) {
    TinyRun run;
    TrainConfig config = quick_config(60);
    config.optim = optim;
    config.learning_rate = optim == std::string("adamw") ? 3e-2 : 3e-1;
    CountingStream stream(-1, 4);
    run.train(config, stream);
    EXPECT_LT(run.logs.back().loss, 0.5 * run.logs.front().loss) << optim;
    EXPECT_EQ(run.logs.back().step, 60);
  }
}

TEST(Trainer, OneByFourEqualsFourByOne) {
  for (const char* normalization : {"tokens", "sequences"}) {
    TrainConfig once = smooth_config(3), split = smooth_config(3);
    once.loss_normalization = split.loss_normalization = normalization;
    split.per_device_train_batch_size = 1;
    split.gradient_accumulation_steps = 4;
    TinyRun a, b;
    CountingStream stream_a, stream_b;
    a.train(once, stream_a);
    b.train(split, stream_b);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_NEAR(a.logs[i].loss, b.logs[i].loss, 1e-5) << normalization;
      EXPECT_NEAR(a.logs[i].grad_norm, b.logs[i].grad_norm, 1e-5) << normalization;
    }
    EXPECT_LT(difference(a.values(), b.values()), 1e-5) << normalization;
    EXPECT_GT(difference(a.values(), TinyRun().values()), 1e-3) << normalization;
  }
}

TEST(Trainer, LossIsNormalisedAsAsked) {
  TrainConfig config = quick_config(1);
  config.learning_rate = 0;
  const auto list = examples(0, 4);
  for (const char* normalization : {"tokens", "sequences"}) {
    TinyRun run;
    double sum = 0, weights = 0;
    for (const auto& example : list) {
      const double mean = evaluate_loss(*run.model, {example}, 1);
      const double weight = normalization == std::string("tokens") ? static_cast<double>(example.targets()) : 1.0;
      sum += weight * mean;
      weights += weight;
    }
    config.loss_normalization = normalization;
    CountingStream stream;
    run.train(config, stream);
    EXPECT_NEAR(run.logs[0].loss, sum / weights, 1e-5) << normalization;
  }
}

TEST(Trainer, LastPartialStepIsNormalisedByItsOwnTargets) {
  TrainConfig config = quick_config(9);
  config.learning_rate = 0;
  config.per_device_train_batch_size = 2;
  config.gradient_accumulation_steps = 2;
  TinyRun run;
  CountingStream stream(5);  // a step of four and a step of one
  const auto result = run.train(config, stream);
  EXPECT_EQ(result.steps, 2);
  EXPECT_NEAR(run.logs[1].loss, evaluate_loss(*run.model, examples(4, 5), 1), 1e-5);
}

TEST(Trainer, EpochsBecomeSteps) {
  TrainConfig config = quick_config(-1);
  config.num_train_epochs = 1.5;
  TinyRun run;
  CountingStream stream;
  EXPECT_EQ(run.train(config, stream, {}, nullptr, 10).steps, 4);  // 15 examples, 4 a step
}

TEST(Trainer, TokenLimitFillsMicroBatches) {
  TrainConfig config = quick_config(2);
  config.max_batch_tokens = 30;
  TinyRun run;
  CountingStream stream;
  run.train(config, stream);
  // What a limit of 30 gives by hand: whole examples in order until the next would not fit.
  int64_t index = 0, tokens = 0;
  for (const auto& log : run.logs) {
    int64_t batch = 0;
    while (batch + static_cast<int64_t>(example_at(index).ids.size()) <= 30) batch += example_at(index++).ids.size();
    tokens += batch;
    EXPECT_EQ(log.tokens, tokens);
  }
}

TEST(Trainer, RoutersAndVectorsHaveTheirOwnRates) {
  TrainConfig config = quick_config();
  config.router_learning_rate = 1e-4;
  config.weight_decay = 0.1;
  TinyRun run;
  int64_t routers = 0;
  for (const auto& t : optimized_tensors(*run.adapter, config)) {
    const bool router = t.name.find("router") != std::string::npos;
    routers += router;
    EXPECT_EQ(t.learning_rate, router ? 1e-4 : 1e-2) << t.name;
    EXPECT_EQ(t.weight_decay, router ? 0.0 : 0.1) << t.name;
    EXPECT_FALSE(t.may_factor) << t.name;
  }
  EXPECT_EQ(routers, 4 * 3);  // four targets in three layers
  adapters::AdapterConfig mov;
  mov.method = "mov";
  mov.num_experts = 2;
  mov.targets = std::vector<std::string>{"k_proj", "v_proj", "down_proj"};
  mov.feedforward = std::vector<std::string>{"down_proj"};
  TinyRun vectors(mov);
  for (const auto& t : optimized_tensors(*vectors.adapter, config)) EXPECT_EQ(t.weight_decay, 0.0);
}

class CheckpointedBlocksRun : public testing::TestWithParam<double> {};

TEST_P(CheckpointedBlocksRun, EqualKeptActivations) {
  TrainConfig kept = smooth_config(2);
  kept.moe_aux_loss_coef = 0.1;
  kept.router_z_loss_coef = 0.01;
  TrainConfig again = kept;
  again.gradient_checkpointing = true;
  auto config = molora_config(GetParam());
  config.layers_to_transform = {1, 2};  // the first layer runs without a graph
  TinyRun a(config), b(config);
  CountingStream stream_a, stream_b;
  a.train(kept, stream_a);
  b.train(again, stream_b);
  EXPECT_NEAR(a.logs[1].loss, b.logs[1].loss, 1e-6);
  EXPECT_NEAR(a.logs[1].aux_loss, b.logs[1].aux_loss, 1e-6);
  EXPECT_NEAR(a.logs[1].grad_norm, b.logs[1].grad_norm, 1e-6);
  EXPECT_LT(difference(a.values(), b.values()), 1e-6);
}
// With dropout the second run of a layer must draw the same masks.
INSTANTIATE_TEST_SUITE_P(Dropout, CheckpointedBlocksRun, testing::Values(0.0, 0.4));

TEST(CheckpointedBlocks, GiveTheSameRunBitForBit) {
  auto ends = [](bool checkpointing) {
    TrainConfig config = quick_config(4);
    config.gradient_checkpointing = checkpointing;
    TinyRun run(molora_config(0.3));
    CountingStream stream;
    run.train(config, stream);
    return std::make_pair(run.logs.back().loss, run.values());
  };
  const auto plain = ends(false), again = ends(true);
  EXPECT_EQ(plain.first, again.first);
  EXPECT_TRUE(torch::equal(plain.second, again.second));
}

TEST(Trainer, RouterLossesReachTheRouters) {
  auto router_values = [](double balance, double z) {
    TrainConfig config = smooth_config(2);
    config.moe_aux_loss_coef = balance;
    config.router_z_loss_coef = z;
    TinyRun run;
    CountingStream stream;
    run.train(config, stream);
    EXPECT_EQ(run.logs[0].aux_loss > 0, balance + z > 0);
    std::vector<torch::Tensor> routers;
    for (const auto& parameter : run.adapter->parameters()) {
      if (parameter.kind == nn::Parameter::Kind::kRouter) routers.push_back(parameter.tensor.detach().flatten());
    }
    return torch::cat(routers).clone();
  };
  const auto plain = router_values(0, 0);
  EXPECT_GT(difference(plain, router_values(0.5, 0)), 1e-5);
  EXPECT_GT(difference(plain, router_values(0, 0.5)), 1e-5);
}

TEST(Trainer, RouterLossesAreThoseOfTrainedRouters) {
  // Another mixture of the same model that is frozen decides too, but neither adds to the loss nor is averaged in.
  auto aux_loss = [](bool beside) {
    TrainConfig config = quick_config(1);
    config.moe_aux_loss_coef = 0.5;
    TinyRun run;
    if (beside) {
      auto frozen = adapters::Adapter::create(molora_config(), run.model->sites(), torch::kCPU, 12);
      frozen->set_trainable(false);
      run.model->attach("frozen", frozen);
    }
    CountingStream stream;
    run.train(config, stream);
    return run.logs[0].aux_loss;
  };
  // Its B is zero, so it does not change what the others read.
  EXPECT_NEAR(aux_loss(false), aux_loss(true), 1e-6);
  EXPECT_GT(aux_loss(false), 0.0);
}

TEST(Trainer, RouterLossesWithoutARouterAreRefused) {
  TrainConfig config = quick_config();
  config.moe_aux_loss_coef = 0.5;
  auto lora = molora_config();
  lora.method = "lora";
  lora.num_experts = 1;
  TinyRun run(lora);
  CountingStream stream;
  EXPECT_THAT([&] { run.train(config, stream); },
              testing::ThrowsMessage<UsageError>(HasSubstr("moe_aux_loss_coef, router_z_loss_coef: got 0.5 and 0")));
}

TEST(Memory, GrowsWithTokensAndShrinksWithCheckpointing) {
  TinyRun run;
  TrainConfig config = quick_config();
  auto activations = [&](int64_t tokens) {
    const auto estimate = estimate_memory(*run.model, *run.adapter, config, tokens, tokens, torch::kCPU);
    for (const auto& [name, bytes] : estimate.parts) {
      if (name == "activations") return bytes;
    }
    return int64_t{-1};
  };
  const int64_t kept = activations(100);
  EXPECT_EQ(activations(200), 2 * kept);
  config.gradient_checkpointing = true;
  // Of three layers the inputs, and the largest whole: 16 numbers of 4 bytes a token and layer.
  EXPECT_LT(activations(100), kept / 2);
  EXPECT_GT(activations(100), 3 * 16 * 4 * 100);
}

TEST(Memory, CountsTrainedTensorsTheirGradientsAndTheOptimizer) {
  TinyRun run;
  TrainConfig config = quick_config();
  auto part = [&](const std::string& wanted) {
    for (const auto& [name, bytes] : estimate_memory(*run.model, *run.adapter, config, 10, 5, torch::kCPU).parts) {
      if (name == wanted) return bytes;
    }
    return int64_t{-1};
  };
  const int64_t trained = 4 * run.values().numel();
  int64_t frozen = 0;
  for (const auto& weight : run.model->parameters()) frozen += 4 * weight.numel();
  EXPECT_EQ(part("frozen weights"), frozen);
  EXPECT_EQ(part("trained tensors"), trained);
  EXPECT_EQ(part("gradients"), trained);
  EXPECT_EQ(part("optimizer state"), 2 * trained);
  config.optim = "adafactor";
  EXPECT_EQ(part("optimizer state"), trained);
}

TEST(Trainer, SentenceRouterReadsTheFrozenModel) {
  auto config = molora_config();
  config.router.input = "sentence";
  TinyRun run(config);
  CountingStream stream(-1, 4);
  TrainConfig training = quick_config(40);
  training.learning_rate = 3e-2;
  run.train(training, stream);
  EXPECT_LT(run.logs.back().loss, 0.7 * run.logs.front().loss);
}

struct ResumeCase {
  std::string name;
  std::function<void(TrainConfig&)> change;
  double dropout = 0.0;
};
void PrintTo(const ResumeCase& value, std::ostream* out) { *out << value.name; }

class Resume : public testing::TestWithParam<ResumeCase> {};

struct Crash {};

TEST_P(Resume, TenStepsEqualFiveAndFiveBitForBit) {
  TemporaryFolder whole, broken;
  TrainConfig config = quick_config(10);
  config.save_steps = 5;
  config.logging_steps = 3;  // a log window spans the crash
  config.lr_scheduler_type = "cosine";
  config.warmup_ratio = 0.2;
  config.resume_from_checkpoint = "auto";
  GetParam().change(config);

  config.output_dir = whole.path();
  TinyRun straight(molora_config(GetParam().dropout));
  CountingStream straight_stream;
  straight.train(config, straight_stream, examples(900, 904));

  config.output_dir = broken.path();
  {
    TinyRun first(molora_config(GetParam().dropout));
    CountingStream stream;
    EXPECT_THROW(first.train(config, stream, examples(900, 904),
                             [](const StepLog& log) {
                               if (log.step == 7) throw Crash();
                             }),
                 Crash);
  }
  TinyRun second(molora_config(GetParam().dropout));
  CountingStream stream;
  second.train(config, stream, examples(900, 904));
  EXPECT_EQ(second.logs.front().step, 6);
  EXPECT_TRUE(torch::equal(straight.values(), second.values()));
  EXPECT_EQ(straight.logs.back().loss, second.logs.back().loss);
  const Json a = read_json(whole.path() / "trainer_state.json"), b = read_json(broken.path() / "trainer_state.json");
  EXPECT_EQ(a, b);
  // The log has each step once, though steps 6 and 7 were run twice.
  std::vector<int64_t> steps;
  for (const Json& row : read_lines(broken.path() / "train_log.jsonl")) {
    if (row.contains("loss")) steps.push_back(row["step"]);
  }
  EXPECT_THAT(steps, testing::ElementsAre(3, 6, 9, 10));
}

INSTANTIATE_TEST_SUITE_P(Runs, Resume,
                         testing::Values(ResumeCase{"adamw with dropout", [](TrainConfig&) {}, 0.3},
                                         ResumeCase{"adafactor", [](TrainConfig& c) { c.optim = "adafactor"; }},
                                         ResumeCase{"token limit", [](TrainConfig& c) { c.max_batch_tokens = 40; }},
                                         ResumeCase{"evaluations and accumulation",
                                                    [](TrainConfig& c) {
                                                      c.eval_steps = 2;
                                                      c.gradient_accumulation_steps = 2;
                                                      c.gradient_checkpointing = true;
                                                    },
                                                    0.3}));

TEST(Trainer, InterruptSavesAndGoesOn) {
  TemporaryFolder folder, other;
  TrainConfig config = quick_config(6);
  config.resume_from_checkpoint = "auto";
  config.output_dir = other.path();
  TinyRun straight;
  CountingStream straight_stream;
  straight.train(config, straight_stream);

  config.output_dir = folder.path();
  TinyRun first;
  CountingStream first_stream;
  const auto result =
      first.train(config, first_stream, {}, nullptr, 0, nullptr, [&] { return first.logs.back().step == 3; });
  EXPECT_TRUE(result.interrupted);
  EXPECT_EQ(result.steps, 3);
  EXPECT_FALSE(fs::exists(folder.path() / "adapter_config.json"));
  TinyRun second;
  CountingStream second_stream;
  EXPECT_FALSE(second.train(config, second_stream).interrupted);
  EXPECT_TRUE(torch::equal(straight.values(), second.values()));
  EXPECT_TRUE(fs::exists(folder.path() / "adapter_config.json"));
}

TEST(Trainer, TaskScoresAreLogged) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(5);
  config.output_dir = folder.path();
  config.task_eval_steps = 2;
  TinyRun run;
  CountingStream stream;
  int64_t calls = 0;
  run.train(config, stream, {}, nullptr, 0, [&] {
    ++calls;
    return Scores{{"rte/acc", 0.1 * calls}, {"cb/f1", 0.5}};
  });
  EXPECT_EQ(calls, 4);  // before the first step, after steps 2, 4 and the last
  std::vector<std::pair<int64_t, double>> scores;
  for (const Json& row : read_lines(folder.path() / "train_log.jsonl")) {
    if (!row.contains("eval/rte/acc")) continue;
    scores.emplace_back(row["step"], row["eval/rte/acc"]);
    EXPECT_EQ(row["eval/cb/f1"], 0.5);
  }
  EXPECT_THAT(scores, testing::ElementsAre(testing::Pair(0, 0.1), testing::Pair(2, 0.2), testing::Pair(4, 0.1 * 3),
                                           testing::Pair(5, 0.4)));
}

TEST(Trainer, DeterministicAlgorithmsAreOnWhileItRuns) {
  auto inside = [](bool deterministic) {
    TrainConfig config = quick_config(1);
    config.deterministic = deterministic;
    TinyRun run;
    CountingStream stream;
    bool on = false;
    run.train(config, stream, {}, [&](const StepLog&) { on = at::globalContext().deterministicAlgorithms(); });
    EXPECT_FALSE(at::globalContext().deterministicAlgorithms()) << "left on behind the run";
    return on;
  };
  EXPECT_TRUE(inside(true));
  EXPECT_FALSE(inside(false));
}

TEST(Trainer, DivergenceNamesStepAndLayerAndSavesNothing) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(6);
  config.output_dir = folder.path();
  config.save_steps = 2;
  TinyRun run;
  CountingStream stream;
  try {
    run.train(config, stream, {}, [&](const StepLog& log) {
      torch::NoGradGuard no_grad;
      for (auto& parameter : run.adapter->parameters()) {
        if (log.step == 3 && parameter.name.find("layers.1.") != std::string::npos) parameter.tensor.fill_(NAN);
      }
    });
    FAIL() << "expected a DataError";
  } catch (const DataError& error) {
    EXPECT_THAT(error.what(), HasSubstr("step 4"));
    EXPECT_THAT(error.what(), HasSubstr("the output of layer 1"));
  }
  for (const auto& checkpoint : list_checkpoints(folder.path())) EXPECT_EQ(checkpoint.step, 2);
}

TEST(Trainer, EarlyStoppingEndsWithTheBestWeights) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(50);
  config.output_dir = folder.path();
  config.eval_steps = 1;
  config.save_steps = 1;
  config.save_total_limit = 1;
  config.early_stopping_patience = 3;
  config.learning_rate = 1.0;  // soon far off
  config.lr_scheduler_type = "constant";
  TinyRun run;
  CountingStream stream;
  const auto held_out = examples(500, 508);
  const auto result = run.train(config, stream, held_out);
  ASSERT_LT(result.steps, 50);
  ASSERT_TRUE(result.best.has_value());
  EXPECT_NEAR(evaluate_loss(*run.model, held_out, 4), result.best->value, 1e-6);
  EXPECT_TRUE(result.stopped_early);
  EXPECT_EQ(result.weights_of, result.steps - 3);
  const Json state = read_json(folder.path() / "trainer_state.json");
  EXPECT_EQ(state["best_model_checkpoint"], fmt::format("checkpoint-{}", result.steps - 3));
  EXPECT_EQ(list_checkpoints(folder.path()).size(), 2u);  // the best and the last
}

TEST(Trainer, EarlyStoppingWatchesATasksScore) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(50);
  config.output_dir = folder.path();
  config.task_eval_steps = 2;
  config.save_steps = 100;
  config.early_stopping_patience = 2;
  config.metric_for_best_model = "eval/rte/acc";
  TinyRun run;
  CountingStream stream;
  const std::vector<double> scores{0.9, 0.3, 0.6, 0.6,
                                   0.5};  // the first is of the untrained model and counts for nothing
  size_t calls = 0;
  torch::Tensor best;
  const auto result = run.train(config, stream, {}, nullptr, 0, [&] {
    if (calls == 2) best = run.values();
    return Scores{{"rte/f1", 1.0}, {"rte/acc", scores.at(calls++)}};
  });
  EXPECT_EQ(calls, 5u);
  EXPECT_TRUE(result.stopped_early);
  EXPECT_EQ(result.steps, 8);
  EXPECT_EQ(result.weights_of, 4);
  ASSERT_TRUE(result.best.has_value());
  EXPECT_EQ(result.best->step, 4);
  EXPECT_EQ(result.best->value, 0.6);
  EXPECT_TRUE(torch::equal(run.values(), best));
  EXPECT_EQ(
      result.stopping_reason(),
      "stopped at step 8: eval/rte/acc has not improved in 2 evaluations; the folder holds the weights of step 4, "
      "where it was 0.6000");
}

TEST(Trainer, TasksOfAnEarlyEndAreScoredWithTheWeightsThatAreKept) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(50);
  config.output_dir = folder.path();
  config.eval_steps = 1;
  config.save_steps = 1;
  config.early_stopping_patience = 3;
  config.learning_rate = 1.0;  // soon far off
  config.lr_scheduler_type = "constant";
  TinyRun run;
  CountingStream stream;
  torch::Tensor scored;
  const auto result = run.train(config, stream, examples(500, 508), nullptr, 0, [&] {
    scored = run.values();
    return Scores{{"rte/acc", 0.5}};
  });
  EXPECT_TRUE(torch::equal(run.values(), scored));
  const Json history = read_json(folder.path() / "trainer_state.json")["log_history"];
  EXPECT_EQ(history.back()["weights_of_step"], result.best->step);
  EXPECT_EQ(history.back()["step"], result.steps);
}

TEST(Trainer, TheBestWeightsMayBeTheLastWord) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(6);
  config.output_dir = folder.path();
  config.eval_steps = 1;
  config.save_steps = 1;
  config.load_best_model_at_end = true;
  config.learning_rate = 1.0;  // soon far off
  config.lr_scheduler_type = "constant";
  TinyRun run;
  CountingStream stream;
  const auto held_out = examples(500, 508);
  const auto result = run.train(config, stream, held_out);
  EXPECT_EQ(result.steps, 6);
  EXPECT_FALSE(result.stopped_early);
  ASSERT_LT(result.weights_of, 6);
  EXPECT_NEAR(evaluate_loss(*run.model, held_out, 4), result.best->value, 1e-6);
  EXPECT_THAT(result.stopping_reason(), HasSubstr("was best before the last step"));
}

TEST(Trainer, EveryDataSetHasAnEvaluationLoss) {
  TrainConfig config = quick_config(2);
  config.eval_steps = 2;
  TinyRun run;
  CountingStream stream;
  const std::vector<EvalSet> sets{{"few", examples(500, 502)}, {"many", examples(510, 520)}};
  std::vector<Json> rows;
  TrainHooks hooks;
  hooks.on_row = [&](const Json& row) { rows.push_back(row); };
  train(*run.model, *run.adapter, stream, sets, config, 0, hooks);
  const Json& row = rows.back();
  EXPECT_NEAR(row["eval_few_loss"], evaluate_loss(*run.model, sets[0].examples, 4), 1e-6);
  EXPECT_NEAR(row["eval_many_loss"], evaluate_loss(*run.model, sets[1].examples, 4), 1e-6);
  std::vector<data::Example> all = sets[0].examples;
  all.insert(all.end(), sets[1].examples.begin(), sets[1].examples.end());
  EXPECT_NEAR(row["eval_loss"], evaluate_loss(*run.model, all, 4), 1e-5);
}

TEST(CheckMetric, NamesWhatIsMeasured) {
  TrainConfig config;
  EXPECT_NO_THROW(check_metric(config, {}));  // nobody asks
  config.metric_for_best_model = "eval/rte/acc";
  EXPECT_NO_THROW(check_metric(config, {"eval_loss", "eval/rte/acc"}));
  try {
    check_metric(config, {"eval_loss", "eval/cb/acc"});
    FAIL() << "expected a UsageError";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("got 'eval/rte/acc', expected one of eval_loss, eval/cb/acc"));
  }
}

TEST(Trainer, LogsForMachines) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(4);
  config.output_dir = folder.path();
  config.report_to = {"jsonl", "tensorboard"};
  config.eval_steps = 4;
  TinyRun run;
  CountingStream stream;
  run.train(config, stream, examples(100, 104), nullptr, 16);
  const auto rows = read_lines(folder.path() / "train_log.jsonl");
  ASSERT_EQ(rows.size(), 3u);  // steps 2 and 4, and the evaluation
  EXPECT_EQ(rows[0]["step"], 2);
  EXPECT_NEAR(rows[0]["loss"].get<double>(), (run.logs[0].loss + run.logs[1].loss) / 2, 1e-9);
  EXPECT_EQ(rows[1]["epoch"], 1.0);
  EXPECT_TRUE(rows[2].contains("eval_loss"));
  const auto routing = read_lines(folder.path() / "router_stats.jsonl");
  ASSERT_EQ(routing.size(), 2u);
  ASSERT_EQ(routing[1]["layers"].size(), 3u);
  for (const Json& layer : routing[1]["layers"]) EXPECT_EQ(layer["owner"], "adapter");
  EXPECT_GT(routing[1]["entropy_share"].get<double>(), 0.5);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path() / "tensorboard"), fs::directory_iterator()), 1);
}

TEST(Trainer, AnEarlierRunIsNotOverwrittenUnasked) {
  TemporaryFolder folder;
  TrainConfig config = quick_config(2);
  config.output_dir = folder.path();
  config.save_steps = 1;
  CountingStream stream;
  TinyRun().train(config, stream);
  EXPECT_THROW(TinyRun().train(config, stream), UsageError);
  config.overwrite_output_dir = true;
  EXPECT_NO_THROW(TinyRun().train(config, stream));
}

TEST(Trainer, WrongSettingsAreListedTogether) {
  TrainConfig config = quick_config();
  config.optim = "sgd";
  config.loss_normalization = "rows";
  config.per_device_train_batch_size = 0;
  CountingStream stream;
  try {
    TinyRun().train(config, stream);
    FAIL() << "expected a UsageError";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("optim: got 'sgd'"));
    EXPECT_THAT(error.what(), HasSubstr("loss_normalization: got 'rows'"));
    EXPECT_THAT(error.what(), HasSubstr("per_device_train_batch_size"));
  }
}

TEST(Trainer, FullFineTuningTrainsEveryWeightAndResumes) {
  TrainConfig config = quick_config(8);
  config.resume_from_checkpoint = "auto";
  config.save_steps = 4;
  auto flat = [](models::CausalLM& model) {
    std::vector<torch::Tensor> all;
    for (auto& parameter : model.parameters()) all.push_back(parameter.detach().flatten());
    return torch::cat(all).clone();
  };
  TemporaryFolder whole, broken;
  config.output_dir = whole.path();
  auto straight = tiny_model();
  const auto before = flat(*straight);
  std::vector<double> losses;
  CountingStream stream(-1, 4);
  auto all_of = [](const std::shared_ptr<models::CausalLM>& model) {
    formats::ModelFolder folder;
    folder.config = {{"model_type", "llama"},    {"vocab_size", 53},       {"hidden_size", 16},
                     {"intermediate_size", 24},  {"num_hidden_layers", 3}, {"num_attention_heads", 4},
                     {"num_key_value_heads", 2}, {"head_dim", 4},          {"tie_word_embeddings", true}};
    return models::AllWeights(model, folder);
  };
  auto all = all_of(straight);
  train(*straight, all, stream, {}, config, 0, {[&](const StepLog& log) { losses.push_back(log.loss); }});
  EXPECT_LT(losses.back(), losses.front());
  for (const auto& parameter : straight->named_parameters()) {
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  }
  EXPECT_GT((flat(*straight) - before).ne(0).to(torch::kFloat64).mean().item<double>(), 0.95);

  config.output_dir = broken.path();
  auto first = tiny_model();
  CountingStream first_stream(-1, 4);
  auto first_all = all_of(first);
  EXPECT_THROW(train(*first, first_all, first_stream, {}, config, 0, {[](const StepLog& log) {
                 if (log.step == 6) throw Crash();
               }}),
               Crash);
  auto second = tiny_model();
  CountingStream second_stream(-1, 4);
  auto second_all = all_of(second);
  train(*second, second_all, second_stream, {}, config, 0);
  EXPECT_TRUE(torch::equal(flat(*straight), flat(*second)));
  // A checkpoint is a model folder.
  const auto saved = models::CausalLM::load(*models::open_checkpoint(broken.path() / "checkpoint-8"), {});
  EXPECT_TRUE(torch::equal(flat(*saved), flat(*second)));
}

}  // namespace
}  // namespace moesaic::train
