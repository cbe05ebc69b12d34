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
  EXPECT_THAT(made.needs_plan().text(), HasSubstr("optimizer state"));
  EXPECT_FALSE(fs::exists(folder_.path() / "out"));
  EXPECT_THAT([&] { made.train(); }, ThrowsMessage<UsageError>(HasSubstr("opened dry")));
}

/// What a dry run refuses; "" when nothing.
std::string refusal_of(const RunConfig& config) {
  try {
    run::Run(config, /*dry=*/true).check_start();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST_F(TrainingRun, ADryRunRefusesWhatTrainingRefuses) {
  run::Run(config()).train();
  EXPECT_THAT(refusal_of(config()), HasSubstr("of an earlier run"));
  EXPECT_EQ(refusal_of(config({{"overwrite_output_dir", true}})), "");
  EXPECT_EQ(refusal_of(config({{"output_dir", (folder_.path() / "other" / "deep").string()}})), "");
  EXPECT_FALSE(fs::exists(folder_.path() / "other"));
  EXPECT_THAT(refusal_of(config({{"output_dir", (folder_.path() / "rows.jsonl" / "out").string()}})),
              HasSubstr("which is a file"));
  const FolderLock held(folder_.path() / "busy");
  EXPECT_THAT(refusal_of(config({{"output_dir", (folder_.path() / "busy").string()}})),
              HasSubstr("a run is at work there"));
}

TEST_F(TrainingRun, ADryRunReadsTheWeightsNames) {
  Json config_json = read_json(folder_.path() / "model" / "config.json");
  config_json["intermediate_size"] = 38;
  write_file_atomically(folder_.path() / "model" / "config.json", config_json.dump());
  EXPECT_THAT(refusal_of(config()), HasSubstr("got [37, 20], expected [38, 20]"));
}

TEST_F(TrainingRun, ADryRunTakesTheAdapterItBeginsWith) {
  run::Run(config()).train();
  const std::string adapter = (folder_.path() / "out").string(), next = (folder_.path() / "next").string();
  const Json begun{{"adapter_name_or_path", adapter}, {"output_dir", next}};
  auto with = [&](Json changes) {
    changes.update(begun);
    return config(changes);
  };
  EXPECT_EQ(refusal_of(with(Json::object())), "");
  EXPECT_THAT([&] { with({{"num_experts", 3}}); },
              ThrowsMessage<UsageError>(HasSubstr("num_experts: got 3, it has 2")));
  EXPECT_THAT([&] { with({{"lora_rank", 2}}); }, ThrowsMessage<UsageError>(HasSubstr("lora_rank: got 2, it has 8")));
  EXPECT_THAT([&] { with({{"finetuning_type", "mov"}}); }, ThrowsMessage<UsageError>(HasSubstr("finetuning_type")));
  EXPECT_THAT(refusal_of(with({{"lora_target", {"q_proj"}}})), HasSubstr("model_name_or_path, lora_target"));
  test::write_small_model(folder_.path() / "wider", "gpt2", 24, 2, 1);
  EXPECT_THAT(refusal_of(with({{"model_name_or_path", (folder_.path() / "wider").string()}})),
              HasSubstr("adapter_name_or_path"));
}

TEST_F(TrainingRun, ADryRunTakesTheCheckpointItGoesOnWith) {
  run::Run(config({{"save_steps", 3}})).train();
  const Json resumed{{"save_steps", 3}, {"max_steps", 5}, {"resume_from_checkpoint", "auto"}};
  auto with = [&](Json changes) {
    Json all = resumed;
    all.update(changes);
    return config(all);
  };
  EXPECT_EQ(refusal_of(with(Json::object())), "");
  const std::string rows = (folder_.path() / "rows.jsonl").string(), more = (folder_.path() / "more.jsonl").string();
  fs::copy_file(rows, more);
  EXPECT_THAT(
      refusal_of(with({{"dataset", {rows, more}}})),
      testing::AllOf(HasSubstr("got 2 data sets, expected the 1"), HasSubstr("adapter_name_or_path=CHECKPOINT")));
  EXPECT_THAT(refusal_of(with({{"optim", "adafactor"}})), HasSubstr("optim: got \"adafactor\", expected \"adamw\""));
  EXPECT_THAT(refusal_of(with({{"resume_from_checkpoint", (folder_.path() / "model").string()},
                               {"output_dir", (folder_.path() / "new").string()}})),
              HasSubstr("no whole checkpoint"));
}

TEST_F(TrainingRun, ASentenceColumnMustBeThereAndFit) {
  const Json router{{"input", "sentence"}, {"sentence_source", "column"}};
  EXPECT_THAT(refusal_of(config({{"router", router}})), HasSubstr("name it with sentence_column"));
  std::ofstream(folder_.path() / "vectors.jsonl") << R"({"inputs": "a", "targets": "b", "v": [1, 2, 3]})" << "\n";
  const Json data{{"dataset", (folder_.path() / "vectors.jsonl").string()}, {"sentence_column", "v"}};
  auto with = [&](int64_t width) {
    Json changes = data;
    changes["router"] = router;
    changes["router"]["sentence_dim"] = width;
    return config(changes);
  };
  EXPECT_EQ(refusal_of(with(3)), "");
  EXPECT_THAT(refusal_of(with(0)), HasSubstr("router.sentence_dim: got 20, expected 3"));
}

TEST_F(TrainingRun, EpochsBecomeSteps) {
  run::Run made(config({{"eval_strategy", "epoch"},
                        {"save_strategy", "epoch"},
                        {"val_size", 2},
                        {"per_device_train_batch_size", 2},
                        {"max_samples", 7}}),
                /*dry=*/true);
  EXPECT_EQ(made.counts()[0].rows, 5);           // 2 of the 7 are held out
  EXPECT_EQ(made.config().train.eval_steps, 3);  // 2 at a time
  EXPECT_EQ(made.config().train.save_steps, 3);
}

TEST_F(TrainingRun, PretrainingLearnsTheTextsOfThePromptColumn) {
  std::ofstream(folder_.path() / "texts.jsonl") << R"({"text": "one two"})" << "\n";
  write_file_atomically(folder_.path() / "dataset_info.json",
                        R"({"demo": {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}})");
  run::Run made(config({{"stage", "pt"}, {"dataset", "demo"}, {"dataset_dir", folder_.path().string()}}), /*dry=*/true);
  const data::Example example = made.next_example(0);
  EXPECT_EQ(example.targets(), std::ssize(example.ids) - 1);
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
