#include "moesaic/base/json.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "tests/temporary_folder.h"

namespace moesaic {
namespace {

using testing::HasSubstr;

/// The message of the `Error` that `action` throws; "" when it throws none.
template <class Error, class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

class InFolder : public testing::Test {
 protected:
  const test::TemporaryFolder temporary_;
  const std::filesystem::path folder_ = temporary_.path();
};

TEST(ParseJson, ReadsValuesAndKeepsOrderWhereAsked) {
  EXPECT_EQ(parse_json(R"({"b": [1, 2.5], "a": null})", "x")["b"][1], 2.5);
  EXPECT_EQ(parse_ordered_json(R"({"b": 1, "a": 2})", "x").dump(), R"({"b":1,"a":2})");
}

TEST(ParseJson, SaysWhereItIsWrong) {
  std::string message = message_of<FormatError>([] { parse_json("{\n \"a\": }", "config.json"); });
  EXPECT_THAT(message, HasSubstr("config.json"));
  EXPECT_THAT(message, HasSubstr("line 2, column 7"));
  EXPECT_THROW(parse_json("", "x"), FormatError);
  EXPECT_THROW(parse_json("{\"a\": 1", "x"), FormatError);
  EXPECT_THROW(parse_json("\"\xff\xfe\"", "x"), FormatError) << "not UTF-8";
  EXPECT_THROW(parse_json("NaN", "x"), FormatError);
  EXPECT_THROW(parse_json("1e999", "x"), FormatError);
}

TEST(ParseJson, RowsMayHoldPythonsNonNumbers) {
  EXPECT_EQ(parse_ordered_json(R"({"a": NaN, "b": [-Infinity, Infinity, 1], "c": "NaN \" Infinity"})", "row").dump(),
            R"({"a":null,"b":[null,null,1],"c":"NaN \" Infinity"})");
  EXPECT_THROW(parse_ordered_json(R"({"a": NaNs})", "row"), FormatError);
  EXPECT_THROW(parse_json(R"({"a": NaN})", "file"), FormatError);
}

TEST(ParseJson, RefusesDeepNestingButNotBracketsInStrings) {
  std::string deep(201, '[');
  EXPECT_THAT(message_of<FormatError>([&] { parse_json(deep, "x"); }), HasSubstr("deeper than 200"));
  EXPECT_THROW(parse_json(std::string(50'000'000, '['), "x"), FormatError);
  EXPECT_EQ(parse_json(std::string(200, '[') + std::string(200, ']'), "x").size(), 1);
  EXPECT_EQ(parse_json('"' + std::string(300, '[') + "\\\"[\"", "x").get<std::string>().size(), 302);
}

TEST_F(InFolder, FilesAreWrittenWholeAndReadBack) {
  auto path = folder_ / "a.json";
  write_file_atomically(path, "{\"x\": 1}");
  write_file_atomically(path, "{\"x\": 2}");
  EXPECT_EQ(read_json(path)["x"], 2);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1) << "no temporary file stays";
  EXPECT_THAT(message_of<DataError>([&] { write_file_atomically(folder_ / "no" / "b", "x"); }),
              HasSubstr("No such file"));
}

TEST_F(InFolder, ReadRefusesFoldersMissingAndLargeFiles) {
  EXPECT_THAT(message_of<DataError>([&] { read_file(folder_); }), HasSubstr("is a folder"));
  EXPECT_THAT(message_of<DataError>([&] { read_file(folder_ / "absent"); }), HasSubstr("No such file"));
  write_file_atomically(folder_ / "large", std::string(11, 'x'));
  EXPECT_EQ(read_file(folder_ / "large", 11), std::string(11, 'x'));
  EXPECT_THROW(read_file(folder_ / "large", 10), FormatError);
  EXPECT_THROW(read_file("/dev/zero", 1000), FormatError) << "an endless file";
}

TEST(Get, GivesTheValueTheFallbackOrTheReason) {
  Json json = {{"i", 3}, {"whole", 4.0}, {"f", 1.5}, {"s", "x"}, {"n", nullptr}, {"b", true}, {"big", 5'000'000'000}};
  EXPECT_EQ(get<int64_t>(json, "i", "w"), 3);
  EXPECT_EQ(get<int64_t>(json, "whole", "w"), 4);
  EXPECT_EQ(get<double>(json, "i", "w"), 3.0);
  EXPECT_EQ(get_or<int64_t>(json, "n", 7, "w"), 7);
  EXPECT_EQ(get_or<std::string>(json, "absent", "d", "w"), "d");
  EXPECT_THAT(message_of<ConfigError>([&] { get<int64_t>(json, "absent", "here"); }), HasSubstr("here: key 'absent'"));
  EXPECT_THAT(message_of<ConfigError>([&] { get<int64_t>(json, "s", "here"); }), HasSubstr("got \"x\""));
  EXPECT_THROW(get<int64_t>(json, "f", "w"), ConfigError) << "a fraction is not an integer";
  EXPECT_THROW(get<int64_t>(json, "b", "w"), ConfigError);
  EXPECT_THROW(get<double>(json, "b", "w"), ConfigError);
  EXPECT_THROW(get<bool>(json, "i", "w"), ConfigError);
  EXPECT_THROW(get<int32_t>(json, "big", "w"), ConfigError);
  EXPECT_THROW(get<uint64_t>(Json{{"x", -1}}, "x", "w"), ConfigError);
  EXPECT_THROW(get<int64_t>(Json{{"x", 1e300}}, "x", "w"), ConfigError);
}

TEST(ReadFile, WaitsForWritersAlone) {
  test::TemporaryFolder folder;
  const std::string path = (folder.path() / "pipe").string();
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_EQ(read_file(path), "") << "nobody writes";
  const int held = open(path.c_str(), O_RDWR);  // as a shell's <(...) has it
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    EXPECT_EQ(write(held, "text", 4), 4);
    close(held);
  });
  EXPECT_EQ(read_file(path), "text");
  writer.join();
  EXPECT_THROW(read_file("/dev/zero", 1000), FormatError);
}

TEST(NearestName, FindsTyposAndPartsOnly) {
  std::vector<std::string> names{"learning_rate", "lora_rank", "seed", "down_proj"};
  EXPECT_EQ(nearest_name("learning-rate", names), "learning_rate");
  EXPECT_EQ(nearest_name("lora_rnak", names), "lora_rank");
  EXPECT_EQ(nearest_name("sede", names), "seed");
  EXPECT_EQ(nearest_name("down", names), "down_proj");
  EXPECT_EQ(nearest_name("temperature", names), "");
  EXPECT_EQ(nearest_name("lerning_rats", names), "learning_rate");  // two edits of twelve letters
  EXPECT_EQ(nearest_name("", {}), "");
}

TEST(NearestName, IsNotFarFetched) {
  const std::vector<std::string> verbs{"train", "merge", "export", "generate", "score"};
  EXPECT_EQ(nearest_name("serve", verbs), "");
  EXPECT_EQ(nearest_name("import", verbs), "");
  EXPECT_EQ(nearest_name("trian", verbs), "train");
  const std::vector<std::string> flags{"--help", "--top_k", "--top_p", "--temperature"};
  EXPECT_EQ(nearest_name("--temp", flags), "--temperature");
  EXPECT_EQ(nearest_name("--hlep", flags), "--help");
  EXPECT_EQ(nearest_name("--x", flags), "");
}

TEST(Json, TextThatEndsEarlyIsCalledSo) {
  for (const char* text : {"", "{\"a\": [1, 2", "{\"a\": \"b"}) {
    EXPECT_THAT([&] { parse_json(text, "x.json"); }, testing::ThrowsMessage<FormatError>(testing::HasSubstr(fmt::format(
                                                         "truncated: {} bytes are there", std::strlen(text)))))
        << text;
  }
  EXPECT_THAT([] { parse_json("{\"a\": nope}", "x.json"); },
              testing::ThrowsMessage<FormatError>(testing::Not(testing::HasSubstr("truncated"))));
}

}  // namespace
}  // namespace moesaic
