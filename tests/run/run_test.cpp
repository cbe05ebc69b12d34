#include "moesaic/run/run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "moesaic/base/yaml.h"
#include "moesaic/run/open.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::ThrowsMessage;

/// The library's way from a run's keys to an adapter's folder.
class TrainingRun : public testing::Test {
 protected:
  void SetUp() override {
    test::write_small_model(folder_.path() / "model", "gpt2", 20, 2, 1);
    std::ofstream rows(folder_.path() / "rows.jsonl");
    for (int i = 0; i < 8; ++i)
      rows << Json{{"inputs", "one " + std::to_string(i)}, {"targets", " two"}}.dump() << "\n";
  }
  RunConfig config(const Json& changes = Json::object()) const {
    Json run = {{"model_name_or_path", (folder_.path() / "model").string()},
                {"dataset", (folder_.path() / "rows.jsonl").string()},
                {"output_dir", (folder_.path() / "out").string()},
                {"finetuning_type", "molora"},
                {"num_experts", 2},
                {"device", "cpu"},
                {"bf16", false},
                {"max_steps", 3},
                {"save_steps", 0}};
    run.merge_patch(changes);
    return parse_run_config(run, "run");
  }

  test::TemporaryFolder folder_;
};

TEST_F(TrainingRun, LeavesWhatOpenReads) {
  run::Run made(config());
  EXPECT_THAT(made.plan().text(), HasSubstr("float32 on cpu: asked for"));
  int64_t steps = 0;
  train::TrainHooks hooks;
  hooks.on_log = [&](const train::StepLog& log) { steps = log.step; };
  const train::TrainResult result = made.train(hooks);
  EXPECT_EQ(result.steps, 3);
  EXPECT_EQ(steps, 3);
  const fs::path out = folder_.path() / "out";
  EXPECT_EQ(read_yaml(out / "run.yaml")["bf16"], false);
  EXPECT_TRUE(fs::exists(out / "README.md") && fs::exists(out / "tokenizer.json"));
  const Opened opened = open((folder_.path() / "model").string(), {{"mine", out}});
  EXPECT_TRUE(opened.model->needs().routed);
}

TEST_F(TrainingRun, StopsBehindTheStep) {
  run::Run made(config({{"max_steps", 50}}));
  train::TrainHooks hooks;
  hooks.stop = [] { return true; };
  const train::TrainResult result = made.train(hooks);
  EXPECT_TRUE(result.interrupted);
  EXPECT_EQ(result.steps, 1);
  EXPECT_TRUE(fs::exists(folder_.path() / "out" / "checkpoint-1"));
  EXPECT_FALSE(fs::exists(folder_.path() / "out" / "README.md"));  // a card is of what is done
}

TEST_F(TrainingRun, APlanTouchesNothing) {
  run::Run made(config(), /*dry=*/true);
  // E (r (in + out) + in) at every linear is what the sites say; here only that it is counted without memory.
  EXPECT_THAT(made.plan().text(), HasSubstr("molora, 2 experts"));
  EXPECT_THAT(made.memory_plan().text(), HasSubstr("optimizer state"));
  EXPECT_FALSE(fs::exists(folder_.path() / "out"));
  EXPECT_THAT([&] { made.train(); }, ThrowsMessage<UsageError>(HasSubstr("opened dry")));
}

TEST_F(TrainingRun, RefusesBeforeItWrites) {
  EXPECT_THAT(
      [&] { run::Run made(config({{"finetuning_type", "lora"}, {"num_experts", nullptr}, {"moe_aux_loss_coef", 1}})); },
      ThrowsMessage<UsageError>(HasSubstr("no router is trained")));
  EXPECT_THAT([&] { run::Run made(config({{"finetuning_type", "calm"}, {"num_experts", nullptr}})); },
              ThrowsMessage<UsageError>(HasSubstr("expected a composition's folder")));
  EXPECT_THAT([&] { run::Run made(config({{"eval_steps", 2}})); }, ThrowsMessage<UsageError>(HasSubstr("val_size")));
  EXPECT_FALSE(fs::exists(folder_.path() / "out"));
}

}  // namespace
}  // namespace moesaic::run
