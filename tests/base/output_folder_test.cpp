#include "moesaic/base/output_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <memory>

#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "tests/temporary_folder.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

void touch(const fs::path& file) {
  fs::create_directories(file.parent_path());
  std::ofstream(file) << "x";
}

TEST(OutputFolder, WhatOthersLeftIsRefusedByName) {
  test::TemporaryFolder folder;
  check_new_folder(folder / "absent", {});
  check_new_folder(folder.path(), {});
  touch(folder / "notes.txt");
  check_new_folder(folder.path(), {});
  for (const char* name : {"config.json", "adapter_config.json", "calm_config.json", "x.gguf", "a.safetensors",
                           "run.yaml", "tokenizer.json", "checkpoint-3"}) {
    touch(folder / name);
    EXPECT_THAT([&] { check_new_folder(folder.path(), {}); }, ThrowsMessage<UsageError>(HasSubstr(name)));
    fs::remove(folder / name);
  }
  EXPECT_THAT([&] { check_new_folder(folder / "notes.txt", {}); }, ThrowsMessage<UsageError>(HasSubstr("got a file")));
}

TEST(OutputFolder, AnInputIsKnownByWhateverName) {
  test::TemporaryFolder folder;
  touch(folder / "model/weights.gguf");
  fs::create_directory_symlink(folder / "model", folder / "link");
  fs::create_directories(folder / "other");
  fs::create_symlink(folder / "model/weights.gguf", folder / "other/linked.gguf");
  for (const char* input : {"model", "link", "model/", "other/../link/.", "model/weights.gguf", "link/weights.gguf"}) {
    for (const char* dir : {"model", "link", "./model/../link"}) {
      EXPECT_THROW(check_not_an_input(folder / dir, {folder / input}), UsageError) << input << " " << dir;
    }
    check_not_an_input(folder / "elsewhere", {folder / input, ""});
    check_not_an_input(folder / "other", {folder / input});
  }
}

pid_t dead_process() {
  const pid_t child = fork();
  if (child == 0) _exit(0);
  waitpid(child, nullptr, 0);
  return child;
}

TEST(OutputFolder, AFileThatStandsThereIsNotReplaced) {
  test::TemporaryFolder folder;
  for (int twice = 0; twice < 2; ++twice) write_new_file(folder / "a", "text");
  EXPECT_THAT([&] { write_new_file(folder / "a", "other"); },
              ThrowsMessage<UsageError>(HasSubstr("nothing is overwritten")));
  EXPECT_THROW(write_new_file(folder.path(), "text"), UsageError);
  EXPECT_EQ(read_file(folder / "a"), "text");
}

TEST(OutputFolder, FilesOfDeadProcessesAreRemovedAndOthersStay) {
  test::TemporaryFolder folder;
  const std::string alive = temporary_name(folder / "sub/a.json");
  touch(alive);
  touch(folder / "notes.tmp");
  const auto dead = folder / fmt::format("a.json.moesaic-{}.tmp", dead_process());
  touch(dead);
  remove_dead_temporaries(folder.path());
  EXPECT_TRUE(fs::exists(alive) && fs::exists(folder / "notes.tmp"));
  EXPECT_FALSE(fs::exists(dead));
}

TEST(FolderLock, NamesItsHolderAndEndsWithIt) {
  test::TemporaryFolder folder;
  const fs::path dir = folder / "deep/out";
  auto lock = std::make_unique<FolderLock>(dir);
  EXPECT_THAT([&] { FolderLock second(dir); },
              ThrowsMessage<UsageError>(AllOf(HasSubstr("a run is at work there"),
                                              HasSubstr(fmt::format("process {}", getpid())), HasSubstr("since"))));
  lock.reset();
  EXPECT_FALSE(fs::exists(folder / "deep"));  // it made it
  touch(dir / "result");
  lock = std::make_unique<FolderLock>(dir);
  lock.reset();
  EXPECT_TRUE(fs::exists(dir / "result") && !fs::exists(dir / "run.lock"));
}

TEST(FolderLock, AKilledHolderHoldsNothing) {
  test::TemporaryFolder folder;
  const pid_t child = fork();
  if (child == 0) {
    FolderLock lock(folder.path());
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(fs::exists(folder / "run.lock"));
  FolderLock lock(folder.path());
}

}  // namespace
}  // namespace moesaic
