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

TEST(Checkpoint, ListsInOrderOfStepsAndCleansUp) {
  TemporaryFolder folder;
  for (int64_t step : {100, 20, 3}) write_checkpoint(folder.path(), step, example(step), write_nothing);
  fs::create_directories(folder.path() / "checkpoint-7");  // no trainer_state.json
  fs::create_directories(folder.path() / "checkpoint-x");
  fs::create_directories(folder.path() / ".unfinished-checkpoint-200");
  fs::create_directories(folder.path() / ".discarded-checkpoint-1");
  EXPECT_THAT(steps(folder.path()), testing::ElementsAre(3, 20, 100));
  EXPECT_FALSE(fs::exists(folder.path() / ".unfinished-checkpoint-200"));
  EXPECT_FALSE(fs::exists(folder.path() / ".discarded-checkpoint-1"));
}

TEST(Checkpoint, RotationKeepsTheNewestAndTheBest) {
  TemporaryFolder folder;
  for (int64_t step : {1, 2, 3, 4, 5}) write_checkpoint(folder.path(), step, example(step), write_nothing);
  rotate_checkpoints(folder.path(), 0, "");
  EXPECT_EQ(steps(folder.path()).size(), 5u);
  rotate_checkpoints(folder.path(), 2, "checkpoint-2");
  EXPECT_THAT(steps(folder.path()), testing::ElementsAre(2, 5));
  rotate_checkpoints(folder.path(), 1, "checkpoint-2");
  EXPECT_THAT(steps(folder.path()), testing::ElementsAre(2, 5));
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
  EXPECT_THAT(steps(folder.path()), testing::ElementsAre(10));
  EXPECT_FALSE(fs::exists(folder.path() / ".unfinished-checkpoint-20"));
  EXPECT_EQ(read_checkpoint(folder.path() / "checkpoint-10").state["global_step"], 10);
}

}  // namespace
}  // namespace moesaic::train
