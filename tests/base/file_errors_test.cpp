#include "moesaic/base/file_errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <fstream>

#include "tests/temporary_folder.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

/// message_of() what `action` throws.
template <class Action>
std::string message(Action action) {
  try {
    action();
  } catch (const fs::filesystem_error& error) {
    return message_of(error);
  }
  return "nothing was thrown";
}

TEST(FileErrors, SayWhereWhatWhyAndWhatHelps) {
  const test::TemporaryFolder folder;
  const fs::path file = folder / "file", inside = file / "a" / "b";
  std::ofstream(file) << "x";
  EXPECT_THAT(message([&] { fs::create_directories(inside); }),
              AllOf(StartsWith(file.string()), HasSubstr(": the folder can't be made: Not a directory\nhint: "),
                    Not(HasSubstr("filesystem error")), Not(HasSubstr("["))));
  EXPECT_THAT(message([&] { fs::file_size(folder / "none"); }),
              HasSubstr("none: its size can't be read: No such file or directory\nhint: "));
  EXPECT_THAT(message([&] { fs::directory_iterator(folder / "none"); }), HasSubstr("none: the folder can't be read: "));
  EXPECT_THAT(message([&] { fs::rename(folder / "none", folder / "other"); }),
              AllOf(HasSubstr("none (with "), HasSubstr("other): can't be renamed: ")));
  EXPECT_THAT(message_of(fs::filesystem_error("something new", "x", std::error_code(EIO, std::generic_category()))),
              "x: can't be used: Input/output error");
}

TEST(FileErrors, RefusalsHaveAHintWhereOneHelps) {
  EXPECT_THAT(refusal(ENOSPC), AllOf(StartsWith("No space left on device\nhint: "), HasSubstr("df -h")));
  EXPECT_THAT(refusal(EACCES), HasSubstr("ls -ld"));
  EXPECT_EQ(refusal(EIO), "Input/output error");
}

TEST(FileErrors, AFileThatEndsEarly) {
  EXPECT_THAT(ends_early(90, 10), StartsWith("the file is truncated: 90 bytes are there, 10 are missing\nhint: "));
  EXPECT_THAT(ends_early(90), StartsWith("the file is truncated: 90 bytes are there, more are missing\nhint: "));
}

}  // namespace
}  // namespace moesaic
