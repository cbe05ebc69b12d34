#include "moesaic/base/file_memory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/time.h>

#include <fstream>

#include "moesaic/base/sha256.h"
#include "tests/temporary_folder.h"

namespace moesaic {
namespace {

class FileMemory : public testing::Test {
 protected:
  ~FileMemory() override { set_file_memory(""); }

  std::filesystem::path write(const std::string& name, const std::string& text) {
    std::ofstream(folder_.path() / name) << text;
    return folder_.path() / name;
  }

  test::TemporaryFolder folder_;
};

TEST_F(FileMemory, WhatWasJustWrittenIsLookedAtAgain) {
  const auto file = write("a", "x");
  int calls = 0;
  auto work = [&] { return std::to_string(++calls); };
  EXPECT_EQ(remembered("test", {file}, work), "1");
  EXPECT_EQ(remembered("test", {file}, work), "2");
  EXPECT_EQ(remembered("test", {folder_.path() / "none"}, work), "3");
}

TEST_F(FileMemory, AnOldFileIsLookedAtOnce) {
  // Nothing a test may change is older than this.
  const std::filesystem::path file = "/proc/self/exe";
  const auto memory = folder_.path() / "memory";
  int calls = 0;
  auto work = [&] { return std::to_string(++calls); };
  set_file_memory(memory);
  EXPECT_EQ(remembered("old file", {file}, work), "1");
  EXPECT_EQ(remembered("old file", {file}, work), "1");
  EXPECT_EQ(remembered("another question", {file}, work), "2");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(memory), {}), 2);
}

TEST_F(FileMemory, HashOfTheBytes) {
  const std::string text(3 << 20, 'y');
  EXPECT_EQ(file_sha256(write("b", text)), sha256_hex(text));
  EXPECT_NE(file_sha256(write("b", text + "z")), sha256_hex(text));
}

}  // namespace
}  // namespace moesaic
