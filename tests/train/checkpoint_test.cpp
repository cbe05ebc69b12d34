#include "moesaic/train/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include "tests/temporary_folder.h"

namespace moesaic::train {
namespace {

using test::TemporaryFolder;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
namespace fs = std::filesystem;

TrainerCheckpoint example(int64_t step) {
  return {{{"global_step", step}}, {{"p.exp_avg", torch::full({2, 3}, static_cast<float>(step))}}};
}

void write_nothing(const fs::path&) {}

std::vector<int64_t> steps(const fs::path& dir) {
  std::vector<int64_t> found;
  for (const auto& checkpoint : list_checkpoints(dir)) found.push_back(checkpoint.step);
  return found;
}

std::vector<std::string> entries(const fs::path& dir) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir)) names.push_back(entry.path().filename().string());
  return names;
}

TEST(Checkpoint, RoundTrip) {
  TemporaryFolder folder;
  const auto path = write_checkpoint(folder.path(), 12, example(12),
                                     [](const fs::path& dir) { write_file_atomically(dir / "weights.txt", "w"); });
  EXPECT_EQ(path.filename(), "checkpoint-12");
  EXPECT_EQ(read_file(path / "weights.txt"), "w");
  const auto loaded = read_checkpoint(path);
  EXPECT_EQ(loaded.state, example(12).state);
  EXPECT_TRUE(torch::equal(loaded.tensors.at("p.exp_avg"), torch::full({2, 3}, 12.0f)));
}

TEST(Checkpoint, ListsInOrderOfStepsAndTouchesNothing) {
  TemporaryFolder folder;
  for (int64_t step : {100, 20, 3}) write_checkpoint(folder.path(), step, example(step), write_nothing);
  fs::create_directories(folder.path() / "checkpoint-x");
  fs::create_directories(folder.path() / ".unfinished-checkpoint-200");
  EXPECT_THAT(steps(folder.path()), ElementsAre(3, 20, 100));
  EXPECT_TRUE(fs::exists(folder.path() / ".unfinished-checkpoint-200"));
}

TEST(Checkpoint, WhatADeadProcessLeftIsRemoved) {
  TemporaryFolder folder;
  write_checkpoint(folder.path(), 20, example(20), write_nothing);
  fs::create_directories(folder.path() / ".unfinished-checkpoint-200");
  fs::create_directories(folder.path() / ".discarded-checkpoint-1");
  remove_unfinished(folder.path());
  EXPECT_THAT(entries(folder.path()), ElementsAre("checkpoint-20"));
}

TEST(Checkpoint, RotationKeepsTheNewestAndTheBest) {
  TemporaryFolder folder;
  for (int64_t step : {1, 2, 3, 4, 5}) write_checkpoint(folder.path(), step, example(step), write_nothing);
  rotate_checkpoints(folder.path(), 0, 5, "");
  EXPECT_EQ(steps(folder.path()).size(), 5u);
  rotate_checkpoints(folder.path(), 2, 5, "checkpoint-2");
  EXPECT_THAT(steps(folder.path()), ElementsAre(2, 5));
  rotate_checkpoints(folder.path(), 1, 5, "checkpoint-2");
  EXPECT_THAT(steps(folder.path()), ElementsAre(2, 5));
}

// A run that passed over a damaged checkpoint 9 went on from 2.
TEST(Checkpoint, RotationNeverPrefersALaterOneToTheNewest) {
  TemporaryFolder folder;
  for (int64_t step : {2, 3, 9}) write_checkpoint(folder.path(), step, example(step), write_nothing);
  rotate_checkpoints(folder.path(), 1, 3, "");
  EXPECT_THAT(steps(folder.path()), ElementsAre(3, 9));
}

/// A run with whole checkpoints of the steps 5 and 10, and weights in them.
class DamagedCheckpoint : public testing::Test {
 protected:
  void SetUp() override {
    for (int64_t step : {5, 10}) {
      write_checkpoint(folder_.path(), step, example(step), [&](const fs::path& dir) {
        fs::create_directories(dir / "adapters");
        write_file_atomically(dir / "adapters" / "weights", std::string(100, 'w') + std::to_string(step));
      });
    }
  }
  fs::path newest() const { return folder_.path() / "checkpoint-10"; }
  /// What is wrong with the newest one, which is then passed over.
  std::string passed_over() const {
    std::vector<std::string> why;
    const auto found = newest_checkpoint(folder_.path(), &why);
    EXPECT_TRUE(found && found->step == 5);
    EXPECT_THAT([&] { read_checkpoint(newest()); }, testing::ThrowsMessage<DataError>(why.at(0)));
    return why.at(0);
  }
  void change_state(const std::string& key, const Json& value) const {
    Json state = read_json(newest() / "trainer_state.json");
    state[key] = value;
    write_file_atomically(newest() / "trainer_state.json", state.dump());
  }

  TemporaryFolder folder_;
};

TEST_F(DamagedCheckpoint, NoneIsPassedOverWhereAllAreWhole) {
  std::vector<std::string> why;
  EXPECT_EQ(newest_checkpoint(folder_.path(), &why)->step, 10);
  EXPECT_TRUE(why.empty());
}

TEST_F(DamagedCheckpoint, AFlippedBitIsNamed) {
  for (const char* name : {"optimizer.safetensors", "adapters/weights"}) {
    const std::string before = read_file(newest() / name);
    std::string bytes = before;
    bytes[bytes.size() - 3] ^= 4;
    write_file_atomically(newest() / name, bytes);
    EXPECT_THAT(passed_over(), AllOf(HasSubstr("checkpoint-10"), HasSubstr(name), HasSubstr("other bytes")));
    write_file_atomically(newest() / name, before);
  }
}

TEST_F(DamagedCheckpoint, AMissingFileIsNamed) {
  for (const char* name : {"adapters/weights", "trainer_state.json", "digests.json"}) {
    fs::rename(newest() / name, folder_.path() / "aside");
    EXPECT_THAT(passed_over(), HasSubstr(name));
    fs::rename(folder_.path() / "aside", newest() / name);
  }
}

TEST_F(DamagedCheckpoint, AFileOfAnotherStepIsNamed) {
  const auto over = fs::copy_options::overwrite_existing;
  fs::copy_file(folder_.path() / "checkpoint-5" / "adapters/weights", newest() / "adapters/weights", over);
  EXPECT_THAT(passed_over(), HasSubstr("adapters/weights"));
  for (const char* name : {"trainer_state.json", "digests.json"}) {
    fs::copy_file(folder_.path() / "checkpoint-5" / name, newest() / name, over);
    EXPECT_THAT(passed_over(), HasSubstr("step"));
  }
}

TEST_F(DamagedCheckpoint, AnImpossibleValueIsNamed) {
  for (const Json& step : {Json(-3), Json("ten"), Json(1e18), Json(7), Json(2.5), Json()}) {
    change_state("global_step", step);
    EXPECT_THAT(passed_over(), HasSubstr("global_step"));
  }
  change_state("global_step", 10);
  change_state("num_input_tokens_seen", Json::array());
  EXPECT_THAT(passed_over(), HasSubstr("num_input_tokens_seen"));
}

TEST(Checkpoint, SameStepIsReplaced) {
  TemporaryFolder folder;
  write_checkpoint(folder.path(), 4, example(4), write_nothing);
  TrainerCheckpoint second = example(4);
  second.state["note"] = "second";
  write_checkpoint(folder.path(), 4, second, write_nothing);
  EXPECT_EQ(read_checkpoint(folder.path() / "checkpoint-4").state["note"], "second");
}

TEST(Checkpoint, NoCheckpointIsSaid) {
  TemporaryFolder folder;
  EXPECT_THROW(read_checkpoint(folder.path()), DataError);
}

TEST(Checkpoint, KillWhileWritingLosesNothing) {
  TemporaryFolder folder;
  write_checkpoint(folder.path(), 10, example(10), write_nothing);
  const pid_t child = fork();
  if (child == 0) {
    write_checkpoint(folder.path(), 20, example(20), [](const fs::path& dir) {
      std::ofstream(dir / "adapter_model.safetensors") << "half";
      raise(SIGKILL);
    });
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  ASSERT_TRUE(fs::exists(folder.path() / ".unfinished-checkpoint-20"));
  EXPECT_THAT(steps(folder.path()), ElementsAre(10));
  remove_unfinished(folder.path());
  EXPECT_FALSE(fs::exists(folder.path() / ".unfinished-checkpoint-20"));
  EXPECT_EQ(read_checkpoint(folder.path() / "checkpoint-10").state["global_step"], 10);
}

}  // namespace
}  // namespace moesaic::train
