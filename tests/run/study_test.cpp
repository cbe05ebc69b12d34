#include "moesaic/run/study.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "moesaic/run/compare.h"
#include "tests/temporary_folder.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

/// A study of two methods, three rates and two seeds whose runs are reports written by hand.
class StudyTest : public testing::Test {
 protected:
  fs::path file(const std::string& more = "", const std::string& seeds = "[1, 2]") {
    const fs::path path = folder_.path() / "study.yaml";
    write_file(path, fmt::format(R"(output_dir: {}
run: {{model_name_or_path: nowhere, dataset: rows.jsonl, val_size: 0.1, eval_steps: 5, router: {{top_k: 1, type: top_k}}}}
methods:
  lora: {{finetuning_type: lora, lora_rank: 4, router: null}}
  molora: {{finetuning_type: molora, router: {{top_k: 2}}}}
seeds: {}
{})",
                                 out().string(), seeds, more));
    return path;
  }
  fs::path out() const { return folder_.path() / "out"; }

  /// Writes the report of a run whose figures are functions of its learning rate.
  RunEnd train(const StudyRun& run) {
    trained_.push_back(run.name);
    if (fails_.contains(run.name)) return RunEnd::kFailed;
    if (run.name == interrupted_) return RunEnd::kInterrupted;
    const double rate = run.config.value("learning_rate", 3e-4);
    const double loss = 1 + std::abs(std::log10(rate) + 3);  // least at 1e-3
    const auto seed = run.config.at("seed").get<int>();
    OrderedJson settings = run.config;
    OrderedJson report{
        {"settings", settings},
        {"status", "finished"},
        {"weights_of", 8},
        {"routing", Json::array()},
        {"data", {{{"name", "rows"}, {"drawn", 64}}}},
        {"samples", Json::array()},
        {"model", "nowhere"},
        {"started", "then"},
        {"seconds", 2.5},
        {"trainable", 100},
        {"base_parameters", 1000},
        {"result_bytes", 400},
        {"peak_memory_bytes", 4096},
        {"moesaic", "1"},
        {"libtorch", "2"},
        {"machine", {{"cpu", "c"}}},
        {"steps", 8},
        {"tokens", 512},
        {"log",
         {{{"step", 0}, {"eval/a/acc", 0.25}, {"eval/b/acc", 0.5}, {"eval_forgetting_loss", 2.0}},
          {{"step", 8}, {"loss", 0.5}},
          {{"step", 8}, {"eval_loss", loss}, {"eval_forgetting_loss", 2.5}},
          {{"step", 8}, {"eval/a/acc", 0.5 + 0.1 * seed}, {"eval/a/acc_norm", 0.1}, {"eval/b/acc", rate * 100}}}}};
    fs::create_directories(run.dir);
    write_file(run.dir / kReportFile, report.dump());
    return RunEnd::kFinished;
  }
  StudyOutcome run(const fs::path& study) {
    trained_.clear();
    return run_study(read_study(study), [this](const StudyRun& each) { return train(each); });
  }
  static void write_file(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

  test::TemporaryFolder folder_;
  std::vector<std::string> trained_;
  std::set<std::string> fails_;
  std::string interrupted_;
};

TEST_F(StudyTest, IsEveryMethodWithEverySettingAndSeed) {
  const Study study =
      read_study(file("settings: {lora_alpha: [8, 16]}\nsweep: {learning_rate: [1.0e-4, 1.0e-3, 1.0e-2]}"));
  ASSERT_EQ(study.rows.size(), 4u);
  EXPECT_EQ(study.rows[1].name, "lora, lora_alpha=16");
  ASSERT_EQ(study.rows[1].choices.size(), 3u);
  const StudyRun& run = study.rows[1].choices[2].runs[1];
  EXPECT_EQ(run.name, "lora, lora_alpha=16, learning_rate=0.01, seed=2");
  EXPECT_EQ(run.dir, out() / "lora,lora_alpha=16" / "learning_rate=0.01" / "seed=2");
  EXPECT_EQ(run.config["lora_alpha"], 16);
  EXPECT_EQ(run.config["seed"], 2);
  EXPECT_FALSE(run.config.contains("router")) << "null takes a key away";
  EXPECT_EQ(study.rows[2].choices[0].runs[0].config["router"], (OrderedJson{{"top_k", 2}, {"type", "top_k"}}));
  EXPECT_TRUE(study.rows[0].choices[0].at_edge);
  EXPECT_FALSE(study.rows[0].choices[1].at_edge);
}

TEST_F(StudyTest, AMethodMaySweepByItself) {
  const Study study = read_study(file("sweep: {learning_rate: [1.0e-4, 1.0e-3]}"),
                                 {"methods.molora.sweep={learning_rate: [1.0e-2, 3.0e-2, 1.0e-1]}"});
  ASSERT_EQ(study.rows.size(), 2u);
  EXPECT_EQ(study.rows[0].choices.size(), 2u);
  ASSERT_EQ(study.rows[1].choices.size(), 3u);
  EXPECT_EQ(study.rows[1].choices[1].runs[0].name, "molora, learning_rate=0.03, seed=1");
  EXPECT_FALSE(study.rows[1].choices[0].runs[0].config.contains("sweep"));
  EXPECT_THAT([&] { read_study(file(""), {"methods.molora.sweep={learning_rate: 3}"}); },
              ThrowsMessage<UsageError>(HasSubstr("methods.molora.sweep.learning_rate: got 3")));
}

TEST_F(StudyTest, EveryRowKeepsWhatServesItBest) {
  const fs::path by_loss = file("sweep: {learning_rate: [1.0e-4, 1.0e-3, 1.0e-2]}");
  StudyOutcome outcome = run(by_loss);
  EXPECT_EQ(trained_.size(), 2u * (3 + 1));
  EXPECT_EQ(outcome.summary["rows"][0]["choice"], "learning_rate=0.001");
  EXPECT_EQ(outcome.summary["rows"][0]["at_edge"], false);
  EXPECT_EQ(outcome.summary["rows"][0]["sweep"]["learning_rate=0.01"], 2.0);
  EXPECT_THAT(outcome.summary["rows"][0]["runs"],
              ElementsAre("lora, learning_rate=0.001, seed=1", "lora, learning_rate=0.001, seed=2"));
  EXPECT_THAT(outcome.rows, ElementsAre("lora", "lora", "molora", "molora"));

  // A second call finds everything done; a mean of scores rises where a loss falls.
  run(by_loss);
  EXPECT_THAT(trained_, ElementsAre());
  outcome = run(file("sweep: {learning_rate: [1.0e-4, 1.0e-3, 1.0e-2]}\nmetric: both\nmeans: {both: ['eval/*/acc']}"));
  EXPECT_EQ(outcome.summary["rows"][1]["choice"], "learning_rate=0.01");
  EXPECT_EQ(outcome.summary["rows"][1]["at_edge"], true);
  EXPECT_EQ(outcome.summary["rows"][1]["sweep"]["learning_rate=0.001"], (0.6 + 0.1) / 2);

  const OrderedJson table = compare_runs(outcome.runs, {{"both", {"eval/*/acc"}}}, outcome.rows);
  ASSERT_EQ(table["comparison"].size(), 3u);
  EXPECT_EQ(table["comparison"][0]["name"], "before training");
  EXPECT_EQ(table["comparison"][0]["figures"]["both"]["mean"], 0.375);
  EXPECT_EQ(table["comparison"][1]["name"], "lora");
  EXPECT_NEAR(table["comparison"][1]["figures"]["both"]["mean"].get<double>(), (0.65 + 1) / 2, 1e-12);
  EXPECT_EQ(table["comparison"][1]["figures"]["both"]["n"], 2);
}

TEST_F(StudyTest, GoesOnBehindAFailedRunAndAnInterruptedOne) {
  const fs::path study = file();
  fails_ = {"lora, seed=2"};
  interrupted_ = "molora, seed=2";
  EXPECT_TRUE(run(study).interrupted);
  EXPECT_THAT(trained_, ElementsAre("lora, seed=1", "lora, seed=2", "molora, seed=1", "molora, seed=2"));
  fails_.clear();
  interrupted_.clear();
  const StudyOutcome outcome = run(study);
  EXPECT_THAT(trained_, ElementsAre("lora, seed=2", "molora, seed=2")) << "what is done stays done";
  EXPECT_TRUE(outcome.summary["failed"].empty());
  EXPECT_EQ(outcome.runs.size(), 4u);
}

TEST_F(StudyTest, RefusesWhatItCanNotRun) {
  auto reading = [&](const std::string& more, const std::string& seeds = "[1]") {
    return [this, more, seeds] { read_study(file(more, seeds)); };
  };
  EXPECT_THAT(reading("sweeps: {}"), ThrowsMessage<UsageError>(AllOf(HasSubstr("sweeps"), HasSubstr("sweep"))));
  EXPECT_THAT(reading("sweep: {learning_rate: 3}"), ThrowsMessage<UsageError>(HasSubstr("sweep.learning_rate: got 3")));
  EXPECT_THAT(reading("sweep: {learning_rat: [3]}"),
              ThrowsMessage<UsageError>(AllOf(HasSubstr("learning_rat"), HasSubstr("lora, learning_rat=3, seed=1"))));
  EXPECT_THAT(reading("", "[1, 1]"), ThrowsMessage<UsageError>(HasSubstr("different numbers")));
  EXPECT_THAT(reading("settings: {output_dir: [x]}"), ThrowsMessage<UsageError>(HasSubstr("output_dir")));
  EXPECT_THAT([&] { run(file("sweep: {learning_rate: [1.0e-3, 1.0e-2]}\nmetric: eval/c/acc")); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("eval/c/acc"), HasSubstr("learning_rate=0.001"))));
  // The folder of one study is not another's.
  run(file());
  EXPECT_THAT(
      [&] { run_study(read_study(file(), {"run.lora_alpha=4"}), [this](const auto& each) { return train(each); }); },
      ThrowsMessage<UsageError>(HasSubstr("seed=1.yaml")));
}

TEST_F(StudyTest, AResultStandsBesidePefts) {
  const StudyOutcome outcome = run(file());
  const OrderedJson result = peft_result(outcome.runs[0], "lora");
  EXPECT_EQ(result["run_info"]["experiment_name"], "lora");
  EXPECT_EQ(result["train_info"]["num_trainable_params"], 100);
  EXPECT_EQ(result["train_info"]["num_total_params"], 1100);
  EXPECT_EQ(result["train_info"]["file_size"], 400);
  const OrderedJson& last = result["train_info"]["metrics"].back();
  EXPECT_NEAR(last["test accuracy"].get<double>(), (0.6 + 0.03) / 2, 1e-12);
  EXPECT_EQ(last["forgetting"], 0.5);
  EXPECT_EQ(last["train samples"], 64);
}

}  // namespace
}  // namespace moesaic::run
