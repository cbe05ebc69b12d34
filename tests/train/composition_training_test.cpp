#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/train/trainer.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::train {
namespace {

using ::testing::HasSubstr;

/// Repeats a few sentences in the anchor's tokens; the later half of each is learnt.
class Sentences : public data::ExampleStream {
 public:
  explicit Sentences(const tokenizer::Tokenizer& tokenizer) {
    for (const char* text :
         {"The keeper wrote until tomorrow", "ships passed before dawn, 12 👍🏽", "every name into a long grey book"}) {
      data::Example& example = examples_.emplace_back();
      example.ids = tokenizer.encode(text, false);
      for (size_t i = 0; i < example.ids.size(); ++i) example.mask.push_back(i >= example.ids.size() / 2);
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
      return compose::open_member(formats::Checkpoint::open(root_.path() / name), {});
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
  for (const auto& parameter : composition->anchor().parameters()) before.push_back(parameter.clone());
  const double start = evaluate_loss(*composition, stream.examples(), 2);
  EXPECT_EQ(start, evaluate_loss(composition->anchor(), nullptr, stream.examples(), 2)) << "W_O = 0";
  train(*composition, stream, {}, config(80), 0);
  EXPECT_LT(evaluate_loss(*composition, stream.examples(), 2), 0.5 * start);
  const auto after = composition->anchor().parameters();
  for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(torch::equal(after[i], before[i]));
}

TEST_F(CompositionTraining, ResumesExactly) {
  const auto whole = fresh();
  Sentences whole_stream(*whole->anchor_member().tokenizer);
  train(*whole, whole_stream, {}, config(6), 0);

  TrainConfig half = config(6);
  half.output_dir = root_.path() / "out";
  half.save_steps = 3;
  const auto first = fresh();
  Sentences first_stream(*first->anchor_member().tokenizer);
  train(*first, first_stream, {}, half, 0);
  EXPECT_TRUE(torch::equal(values(*first), values(*whole)));
  const auto second = fresh();
  Sentences second_stream(*second->anchor_member().tokenizer);
  half.resume_from_checkpoint = (half.output_dir / "checkpoint-3").string();
  train(*second, second_stream, {}, half, 0);
  EXPECT_TRUE(torch::equal(values(*second), values(*whole)));
  EXPECT_TRUE(torch::equal(values(*compose::load_composition(half.output_dir, {})), values(*whole)));
}

TEST_F(CompositionTraining, WhatCannotBeTrainedIsRefused) {
  const auto composition = fresh("full");
  Sentences stream(*composition->anchor_member().tokenizer);
  TrainConfig wrong = config(1);
  wrong.gradient_checkpointing = true;
  try {
    train(*composition, stream, {}, wrong, 0);
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("mask full"));
    EXPECT_THAT(error.what(), HasSubstr("gradient_checkpointing"));
  }
}

}  // namespace
}  // namespace moesaic::train
