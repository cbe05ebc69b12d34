#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/compose/folder.h"
#include "moesaic/models/registry.h"
#include "moesaic/train/trainer.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::train {
namespace {

using ::testing::HasSubstr;

/// Trains the connections (and the models' adapters).
void train_connections(const std::shared_ptr<compose::Composition>& composition, data::ExampleStream& stream,
                       const TrainConfig& config, const std::vector<data::Example>& eval_examples = {},
                       const std::function<void(const StepLog&)>& on_log = nullptr, bool train_adapters = false) {
  compose::Connections connections(composition, train_adapters);
  std::vector<EvalSet> eval_sets;
  if (!eval_examples.empty()) eval_sets.push_back({"held_out", eval_examples});
  train(*composition, connections, stream, eval_sets, config, 0, {.on_log = on_log});
}

/// Repeats a few sentences in the anchor's tokens; the later half of each is learnt.
class Sentences : public data::ExampleStream {
 public:
  explicit Sentences(const tokenizer::Tokenizer& tokenizer) {
    for (const char* text : {"The keeper wrote until tomorrow", "ships passed before dawn, 12 👍🏽",
                             "every name into a long grey book", "So it"}) {
      data::Example& example = examples_.emplace_back();
      example.ids = tokenizer.encode(text, false);
      for (size_t i = 0; i < example.ids.size(); ++i) example.mask.push_back(i >= example.ids.size() / 2);
      example.end_prompts_by_mask();
    }
  }
  std::optional<data::Example> next() override { return examples_[position_++ % examples_.size()]; }
  Json state() const override { return {{"position", position_}}; }
  void set_state(const Json& state) override { position_ = state.at("position").get<size_t>(); }
  const std::vector<data::Example>& examples() const { return examples_; }

 private:
  std::vector<data::Example> examples_;
  size_t position_ = 0;
};

class CompositionTraining : public ::testing::Test {
 protected:
  CompositionTraining() {
    test::write_small_model(root_.path() / "anchor", "gpt2", 20, 3, 1);
    test::write_small_model(root_.path() / "aug", "llama3", 14, 4, 2);
  }
  std::shared_ptr<compose::Composition> fresh(const std::string& mask = "causal") const {
    auto open = [&](const char* name) {
      return compose::open_member(models::open_checkpoint(root_.path() / name), {});
    };
    return std::make_shared<compose::Composition>(test::config_of({{{{0, 1}, {2, 2}}, "word", mask}}), open("anchor"),
                                                  std::vector{open("aug")}, 7);
  }
  static TrainConfig config(int64_t steps) {
    TrainConfig config;
    config.per_device_train_batch_size = 2;
    config.gradient_accumulation_steps = 2;
    config.learning_rate = 2e-2;
    config.lr_scheduler_type = "constant";
    config.max_steps = steps;
    config.save_steps = 0;
    return config;
  }
  static torch::Tensor values(const compose::Composition& composition) {
    std::vector<torch::Tensor> flat;
    for (const auto& parameter : composition.parameters()) flat.push_back(parameter.detach().flatten());
    return torch::cat(flat);
  }

  test::TemporaryFolder root_;
};

TEST_F(CompositionTraining, LearnsWithTheConnectionsAlone) {
  const auto composition = fresh();
  Sentences stream(*composition->anchor_member().tokenizer);
  std::vector<torch::Tensor> before;
  for (const auto& parameter : composition->anchor_member().model->parameters()) before.push_back(parameter.clone());
  const double start = evaluate_loss(*composition, stream.examples(), 2);
  EXPECT_EQ(start, evaluate_loss(*composition->anchor_member().model, stream.examples(), 2)) << "W_O = 0";
  train_connections(composition, stream, config(80));
  EXPECT_LT(evaluate_loss(*composition, stream.examples(), 2), 0.5 * start);
  const auto after = composition->anchor_member().model->parameters();
  for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(torch::equal(after[i], before[i]));
}

TEST_F(CompositionTraining, ResumesExactly) {
  const auto whole = fresh();
  Sentences whole_stream(*whole->anchor_member().tokenizer);
  train_connections(whole, whole_stream, config(6));

  TrainConfig half = config(6);
  half.output_dir = root_.path() / "out";
  half.save_steps = 3;
  const auto first = fresh();
  Sentences first_stream(*first->anchor_member().tokenizer);
  train_connections(first, first_stream, half);
  EXPECT_TRUE(torch::equal(values(*first), values(*whole)));
  const auto second = fresh();
  Sentences second_stream(*second->anchor_member().tokenizer);
  half.resume_from_checkpoint = (half.output_dir / "checkpoint-3").string();
  train_connections(second, second_stream, half);
  EXPECT_TRUE(torch::equal(values(*second), values(*whole)));
  EXPECT_TRUE(torch::equal(values(*compose::load_composition(half.output_dir, {})), values(*whole)));
}

/// What a run logs of every step, and the numbers it ends with.
struct RunResult {
  std::vector<double> losses;
  torch::Tensor values;
  bool operator==(const RunResult& other) const { return losses == other.losses && torch::equal(values, other.values); }
};

/// Batches of three out of four, so that every sentence has other company each time; one is shorter than the rows from
/// which a GEMM's results no longer depend on their number.
class FrozenStates : public CompositionTraining {
 protected:
  RunResult run(std::shared_ptr<compose::StateCache> states, const std::string& mask = "causal") const {
    const auto composition = fresh(mask);
    composition->keep_states(std::move(states));
    Sentences stream(*composition->anchor_member().tokenizer);
    TrainConfig settings = config(9);
    settings.per_device_train_batch_size = 3;
    settings.gradient_accumulation_steps = 1;
    settings.eval_steps = 4;
    RunResult result;
    train_connections(composition, stream, settings, stream.examples(),
                      [&](const StepLog& log) { result.losses.push_back(log.loss); });
    result.values = values(*composition);
    return result;
  }
  static std::shared_ptr<compose::StateCache> cache(int64_t bytes = 1 << 30, const std::filesystem::path& folder = {}) {
    return std::make_shared<compose::StateCache>(bytes, folder);
  }
};

TEST_F(FrozenStates, FromTheCacheGiveTheSameRunBitForBit) {
  for (const char* mask : {"causal", "prefix"}) EXPECT_EQ(run(nullptr, mask), run(cache(), mask)) << mask;
}

TEST_F(FrozenStates, FromAFolderGiveTheSameRunBitForBit) {
  const auto states = root_.path() / "states";
  const RunResult computed = run(nullptr);
  EXPECT_EQ(computed, run(cache(1 << 30, states)));
  // Four sentences in two models; the next run finds all of them and writes none.
  auto files = [&] { return std::distance(std::filesystem::directory_iterator(states), {}); };
  EXPECT_EQ(files(), 8);
  EXPECT_EQ(computed, run(cache(1 << 30, states)));
  EXPECT_EQ(files(), 8);
}

TEST_F(FrozenStates, OfAnotherModelAreNotTaken) {
  const auto states = root_.path() / "states";
  const RunResult before = run(cache(1 << 30, states));
  test::write_small_model(root_.path() / "aug", "llama3", 14, 4, 3);
  const RunResult changed = run(cache(1 << 30, states));
  EXPECT_FALSE(before == changed);
  EXPECT_EQ(changed, run(nullptr));
}

TEST_F(FrozenStates, ASmallCacheGivesTheSameRunToo) { EXPECT_EQ(run(nullptr), run(cache(2000))); }

/// The anchor's adapter learns beside the connections, survives a stop, and is not touched where it is frozen.
TEST_F(CompositionTraining, AdaptersAreTrainedTogetherOrFrozen) {
  {
    const auto anchor = compose::open_member(models::open_checkpoint(root_.path() / "anchor"), {});
    adapters::AdapterConfig config;
    config.method = "molora";
    config.num_experts = 2;
    config.lora_rank = 2;
    config.targets = std::vector<std::string>{"q_proj", "up_proj"};
    adapters::Adapter::create(config, anchor.model->sites(), torch::kCPU, 3)->save(root_.path() / "adapter");
  }
  auto carrying = [&] {
    auto open = [&](const char* name, const std::filesystem::path& adapter) {
      return compose::open_member(models::open_checkpoint(root_.path() / name), {}, {.adapter = adapter});
    };
    return std::make_shared<compose::Composition>(test::config_of({{{{0, 1}, {2, 2}}}}),
                                                  open("anchor", root_.path() / "adapter"),
                                                  std::vector{open("aug", {})}, 7);
  };
  auto adapter_values = [](const compose::Composition& composition) {
    std::vector<torch::Tensor> flat;
    for (const auto& parameter : composition.adapters()[0].second->parameters()) {
      flat.push_back(parameter.tensor.detach().flatten());
    }
    return torch::cat(flat);
  };
  const torch::Tensor start = adapter_values(*carrying());
  TrainConfig settings = config(6);
  const auto frozen = carrying();
  Sentences frozen_stream(*frozen->anchor_member().tokenizer);
  train_connections(frozen, frozen_stream, settings);
  EXPECT_TRUE(torch::equal(adapter_values(*frozen), start));

  settings.moe_aux_loss_coef = 0.01;
  settings.output_dir = root_.path() / "out";
  settings.save_steps = 3;
  const auto trained = carrying();
  Sentences stream(*trained->anchor_member().tokenizer);
  double aux_loss = 0;
  train_connections(trained, stream, settings, {}, [&](const StepLog& log) { aux_loss = log.aux_loss; }, true);
  EXPECT_FALSE(torch::equal(adapter_values(*trained), start));
  EXPECT_GT(aux_loss, 0.0);
  const auto resumed = carrying();
  Sentences resumed_stream(*resumed->anchor_member().tokenizer);
  settings.resume_from_checkpoint = (settings.output_dir / "checkpoint-3").string();
  train_connections(resumed, resumed_stream, settings, {}, nullptr, true);
  EXPECT_TRUE(torch::equal(adapter_values(*resumed), adapter_values(*trained)));
  EXPECT_TRUE(torch::equal(values(*resumed), values(*trained)));
  EXPECT_TRUE(
      torch::equal(adapter_values(*compose::load_composition(settings.output_dir, {})), adapter_values(*trained)));
}

/// Routers of an augmenting model are balanced and logged under its name, checkpointed or not.
TEST_F(CompositionTraining, RoutersOfAugmentingModelsAreBalancedAndLogged) {
  {
    const auto aug = compose::open_member(models::open_checkpoint(root_.path() / "aug"), {});
    adapters::AdapterConfig config;
    config.method = "molora";
    config.num_experts = 3;
    config.lora_rank = 2;
    config.targets = std::vector<std::string>{"q_proj", "up_proj"};
    adapters::Adapter::create(config, aug.model->sites(), torch::kCPU, 3)->save(root_.path() / "adapter");
  }
  auto run = [&](double coefficient, bool checkpointing) {
    auto open = [&](const char* name, const std::filesystem::path& adapter) {
      return compose::open_member(models::open_checkpoint(root_.path() / name), {}, {.adapter = adapter});
    };
    const auto composition =
        std::make_shared<compose::Composition>(test::config_of({{{{0, 1}, {2, 2}}}}), open("anchor", {}),
                                               std::vector{open("aug", root_.path() / "adapter")}, 7);
    Sentences stream(*composition->anchor_member().tokenizer);
    TrainConfig settings = config(3);
    settings.moe_aux_loss_coef = coefficient;
    settings.gradient_checkpointing = checkpointing;
    settings.logging_steps = 1;
    settings.output_dir = root_.path() / fmt::format("out-{}-{}", coefficient, checkpointing);
    double aux_loss = 0;
    train_connections(composition, stream, settings, {}, [&](const StepLog& log) { aux_loss = log.aux_loss; }, true);
    std::vector<torch::Tensor> routers;
    for (const nn::Parameter& parameter : composition->adapters()[0].second->parameters()) {
      if (parameter.kind == nn::Parameter::Kind::kRouter) routers.push_back(parameter.tensor.detach().flatten());
    }
    std::ifstream rows(settings.output_dir / "router_stats.jsonl");
    int64_t steps = 0;
    for (std::string line; std::getline(rows, line); ++steps) {
      for (const Json& layer : Json::parse(line)["layers"]) EXPECT_EQ(layer["owner"], "augmenting.0");
    }
    EXPECT_EQ(steps, 3);
    return std::make_pair(aux_loss, torch::cat(routers));
  };
  const auto off = run(0.0, false), on = run(1.0, false), again = run(1.0, true);
  EXPECT_EQ(off.first, 0.0);
  EXPECT_NEAR(on.first, 1.0, 0.3);  // E sum_e f_e p_e is 1 when all experts are used alike
  EXPECT_FALSE(torch::equal(on.second, off.second));
  EXPECT_NEAR(again.first, on.first, 1e-5);
}

TEST_F(CompositionTraining, DivergenceNamesTheModelAndItsLayer) {
  const auto composition = fresh();
  Sentences stream(*composition->anchor_member().tokenizer);
  TrainConfig settings = config(2);
  {
    torch::NoGradGuard no_grad;
    composition->augmenting()[0].model->named_parameters()["model.layers.1.mlp.up_proj.weight"].fill_(NAN);
  }
  try {
    train_connections(composition, stream, settings);
    FAIL() << "expected a DataError";
  } catch (const DataError& error) {
    EXPECT_THAT(error.what(), HasSubstr("step 1"));
    EXPECT_THAT(error.what(), HasSubstr("layer 1 of the model at augmenting.0"));
  }
}

TEST_F(CompositionTraining, CheckpointedBlocksGiveTheSameRun) {
  std::vector<torch::Tensor> ends;
  for (const bool checkpointing : {false, true}) {
    const auto composition = fresh();
    Sentences stream(*composition->anchor_member().tokenizer);
    TrainConfig settings = config(5);
    settings.gradient_checkpointing = checkpointing;
    train_connections(composition, stream, settings);
    ends.push_back(values(*composition));
  }
  EXPECT_TRUE(torch::equal(ends[0], ends[1]));
}

TEST_F(CompositionTraining, WhatCannotBeTrainedIsRefused) {
  const auto composition = fresh("full");
  Sentences stream(*composition->anchor_member().tokenizer);
  try {
    train_connections(composition, stream, config(1), {}, nullptr, /*train_adapters=*/true);
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("mask full"));
    EXPECT_THAT(error.what(), HasSubstr("none of its models carries an adapter"));
  }
}

}  // namespace
}  // namespace moesaic::train
