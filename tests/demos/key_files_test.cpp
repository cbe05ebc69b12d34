#include "demos/key_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "demos/key_arithmetic.h"
#include "moesaic/data/texts.h"
#include "tests/temporary_folder.h"

namespace moesaic::demos {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;
namespace fs = std::filesystem;

std::vector<Json> rows_of(const fs::path& file) {
  std::istringstream lines(read_file(file));
  std::vector<Json> rows;
  for (std::string line; std::getline(lines, line);) rows.push_back(parse_json(line, file.string()));
  return rows;
}

/// "a op b" or "a op b =": its three parts.
struct Expression {
  std::string left, op, right;
  explicit Expression(const std::string& text) { std::istringstream(text) >> left >> op >> right; }
  int64_t result() const {
    return op == "+" ? std::stoll(left) + std::stoll(right) : std::stoll(left) - std::stoll(right);
  }
};

class KeyFiles : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<test::TemporaryFolder>();
    write_key_files(folder_->path(), 50, 3);
    const auto names = draw_key_names(500, 3);
    for (size_t i = 0; i < names.size(); ++i) number_[names[i]] = static_cast<int64_t>(i);
  }
  static void TearDownTestSuite() { folder_.reset(); }
  static std::vector<Json> rows(const std::string& name) { return rows_of(folder_->path() / (name + ".jsonl")); }
  static std::string prompt(const Json& row) { return row.at("inputs"); }

  inline static std::unique_ptr<test::TemporaryFolder> folder_;
  inline static std::map<std::string, int64_t> number_;  // of each key
};

TEST_F(KeyFiles, KeysAreFiveHundredDifferentShortWords) {
  EXPECT_EQ(number_.size(), 500u);
  for (const auto& [name, number] : number_) {
    EXPECT_TRUE(name.size() >= 2 && name.size() <= 6) << name;
  }
}

TEST_F(KeyFiles, EveryKeyIsWorthOneTwoDigitNumberInAllFiles) {
  std::map<std::string, std::string> worth;
  for (const std::string name : {"kv_sub", "kv_math", "test/kv_sub", "test/kv_math", "held_in/kv_sub"}) {
    for (const Json& row : rows(name)) {
      const Json& targets = row.at("targets");
      const Expression keys(prompt(row)), values((targets.is_array() ? targets[0] : targets).get<std::string>());
      EXPECT_EQ(keys.op, values.op);
      for (const auto& [key, value] : {std::pair(keys.left, values.left), {keys.right, values.right}}) {
        EXPECT_EQ(value.size(), 2u);
        EXPECT_EQ(worth.emplace(key, value).first->second, value) << key;
      }
    }
  }
  EXPECT_EQ(worth.size(), 500u);
}

TEST_F(KeyFiles, HeldInKeysAreTheFirstHundredAndNoOther) {
  auto numbers = [&](const std::string& name) {
    std::set<int64_t> numbers;
    for (const Json& row : rows(name)) {
      const Expression keys(prompt(row));
      numbers.insert({number_.at(keys.left), number_.at(keys.right)});
    }
    return numbers;
  };
  EXPECT_EQ(*numbers("kv_math").rbegin(), 99);
  EXPECT_EQ(*numbers("held_in/kv_math").rbegin() < 100, true);
  EXPECT_GE(*numbers("test/kv_sub").begin(), 100);
  EXPECT_GE(*numbers("test/kv_math").begin(), 100);
}

TEST_F(KeyFiles, AnswersAreRightAndNeverNegative) {
  for (const std::string name : {"num_math", "kv_math"}) {
    for (const Json& row : rows(name)) {
      const std::string target = row.at("targets");
      const Expression numbers(name == "num_math" ? prompt(row) : target);
      EXPECT_GE(numbers.result(), 0);
      const std::string result = " " + std::to_string(numbers.result());
      EXPECT_EQ(target, name == "num_math"
                            ? result
                            : " " + numbers.left + " " + numbers.op + " " + numbers.right + " =" + result);
    }
  }
  for (const Json& row : rows("test/kv_math")) {
    const std::string worked = row.at("targets")[0], number = row.at("targets")[1];
    EXPECT_EQ(worked, worked.substr(0, worked.find(" = ")) + " = " + number);
    EXPECT_EQ(std::to_string(Expression(worked).result()), number);
  }
}

TEST_F(KeyFiles, ATenthOfTheExpressionsIsOnlyInTests) {
  std::set<std::string> trained;
  for (const Json& row : rows("num_math")) {
    const Expression e(prompt(row));
    trained.insert(e.left + e.op + e.right);
  }
  for (const Json& row : rows("kv_math")) {
    const Expression e(row.at("targets").get<std::string>());
    trained.insert(e.left + e.op + e.right);
  }
  for (const std::string name : {"test/num_math", "test/kv_math", "held_in/kv_math"}) {
    for (const Json& row : rows(name)) {
      const Expression e(name == "test/num_math" ? prompt(row) : row.at("targets")[0].get<std::string>());
      EXPECT_FALSE(trained.contains(e.left + e.op + e.right));
    }
  }
  // 12,195 expressions of two numbers of 10 to 99 are not negative; a tenth is held out.
  int64_t held_out = 0;
  for (int left = 10; left < 100; ++left) {
    for (int right = 10; right < 100; ++right) {
      for (const char* op : {"+", "-"}) {
        if (*op == '-' && left < right) continue;
        held_out += !trained.contains(std::to_string(left) + op + std::to_string(right));
      }
    }
  }
  // What 16,000 draws never hit is held out, or was missed with probability about exp(-8000 / 10976) = 0.48.
  EXPECT_GT(held_out, 1220);
  EXPECT_LT(held_out, 1220 + 0.48 * 10976);
}

TEST_F(KeyFiles, QuestionsAreDifferentAndTheRegistryNamesTheSets) {
  std::set<std::string> questions;
  for (const Json& row : rows("test/num_math")) questions.insert(prompt(row));
  EXPECT_EQ(questions.size(), 50u);
  const auto configs = data::resolve_datasets(Json::array({"kv_sub", "num_math", "kv_math"}), folder_->path());
  ASSERT_EQ(configs.size(), 3u);
  EXPECT_EQ(data::RowReader::open(configs[0])->count(), 40000);
  EXPECT_EQ(data::RowReader::open(configs[2])->count(), 8000);
}

TEST_F(KeyFiles, FollowFromTheSeed) {
  const test::TemporaryFolder again, other;
  write_key_files(again.path(), 50, 3);
  write_key_files(other.path(), 50, 4);
  for (const char* name : {"kv_sub.jsonl", "num_math.jsonl", "test/kv_math.jsonl"}) {
    EXPECT_EQ(read_file(again.path() / name), read_file(folder_->path() / name)) << name;
    EXPECT_NE(read_file(other.path() / name), read_file(folder_->path() / name)) << name;
  }
}

TEST_F(KeyFiles, MoreQuestionsThanThereAre) {
  const test::TemporaryFolder other;
  EXPECT_THAT([&] { write_key_files(other.path(), 5000, 0); },
              ThrowsMessage<UsageError>(HasSubstr("test/num_math: there are only about")));
}

TEST(PlainTexts, PromptsAnswersAndMessagesUpToAnEqualShare) {
  const test::TemporaryFolder folder;
  write_file_atomically(folder.path() / "a.jsonl",
                        "{\"inputs\": \"one\", \"targets\": \"two\"}\n"
                        "{\"inputs\": \"three\", \"targets\": \"four\"}\n");
  write_file_atomically(folder.path() / "b.jsonl",
                        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, "
                        "{\"role\": \"assistant\", \"content\": \"hello\"}]}\n");
  const auto configs = data::resolve_datasets(Json::array({"a.jsonl", "b.jsonl"}), folder.path());
  EXPECT_THAT(plain_texts(configs, 1000), ElementsAre("one", "two", "three", "four", "hi", "hello"));
  // 11 bytes each: "one", "two" and "three" fill the first share, "hi" and "hello" fit the second.
  EXPECT_THAT(plain_texts(configs, 22), ElementsAre("one", "two", "three", "hi", "hello"));
}

}  // namespace
}  // namespace moesaic::demos
