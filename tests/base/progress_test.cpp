#include "moesaic/base/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <array>

#include "moesaic/base/check.h"
#include "moesaic/base/log.h"

namespace moesaic {
namespace {

/// What `action` writes to a stream that is not a terminal.
template <class Action>
std::string written_by(Action action) {
  std::FILE* stream = std::tmpfile();
  action(stream);
  std::rewind(stream);
  std::array<char, 4096> buffer;
  std::string text(buffer.data(), std::fread(buffer.data(), 1, buffer.size(), stream));
  std::fclose(stream);
  return text;
}

class LogLevel : public testing::Test {
 protected:
  void TearDown() override { spdlog::set_level(before_); }
  spdlog::level::level_enum before_ = spdlog::get_level();
};

TEST(Format, DurationsAndCounts) {
  EXPECT_EQ(format_duration(3.6), "4 s");
  EXPECT_EQ(format_duration(59.6), "1:00 min");
  EXPECT_EQ(format_duration(187), "3:07 min");
  EXPECT_EQ(format_duration(7509), "2:05:09 h");
  EXPECT_EQ(format_duration(-1), "?");
  EXPECT_EQ(format_count(812), "812");
  EXPECT_EQ(format_count(9876), "9.9k");
  EXPECT_EQ(format_count(1234567), "1.2M");
}

TEST_F(LogLevel, ProgressWritesPlainLinesWhereThereIsNoTerminal) {
  spdlog::set_level(spdlog::level::info);
  std::string text = written_by([](std::FILE* stream) {
    Progress progress("train", 10, 4, stream, 0);
    progress.update(7, "loss 1.5");
    progress.update(10, "loss 1.2");
  });
  EXPECT_THAT(text, testing::MatchesRegex("train 7/10  loss 1.5  0 s left\ntrain 10/10  loss 1.2  0 s left\n"
                                          "train 10/10  loss 1.2  in 0 s\n"));
}

TEST_F(LogLevel, ProgressKeepsQuietBetweenIntervalsAndWhenAsked) {
  spdlog::set_level(spdlog::level::info);
  auto work = [](std::FILE* stream) {
    Progress progress("x", 2, 0, stream, 3600);
    progress.update(1);
  };
  EXPECT_EQ(written_by(work), "x 1/2  in 0 s\n");
  spdlog::set_level(spdlog::level::warn);
  EXPECT_EQ(written_by(work), "");
}

TEST_F(LogLevel, SetByName) {
  set_log_level("warning");
  EXPECT_EQ(spdlog::get_level(), spdlog::level::warn);
  set_log_level("off");
  EXPECT_EQ(spdlog::get_level(), spdlog::level::off);
  EXPECT_THROW(set_log_level("loud"), UsageError);
}

}  // namespace
}  // namespace moesaic
