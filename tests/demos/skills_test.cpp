#include "demos/skills.h"

#include <gmock/gmock.h>

#include <set>

#include "tests/data/fixtures.h"

namespace moesaic::demos {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

std::string question(const OrderedJson& row) { return row.at("messages")[0].at("content"); }
std::string answer(const OrderedJson& row) { return row.at("messages")[1].at("content"); }

/// The question's numbers and words between the parts of one wording; "" when it is another wording.
std::string between(const std::string& text, const std::string& before, const std::string& after) {
  size_t begin = text.find(before);
  if (begin == std::string::npos) return "";
  begin += before.size();
  return text.substr(begin, after.empty() ? std::string::npos : text.find(after, begin) - begin);
}

TEST(Skills, AtLeastSixTrainedAndTwoHeldOut) {
  int trained = 0, held_out = 0;
  for (const Skill& skill : skills()) (skill.held_out ? held_out : trained) += 1;
  EXPECT_GE(trained, 6);
  EXPECT_EQ(held_out, 2);
}

TEST(Skills, RowsAreShortQuestionsWithShortAnswersInSeveralWordings) {
  for (const Skill& skill : skills()) {
    auto rows = generate_skill(skill.name, "test", 40, 1);
    ASSERT_EQ(rows.size(), 40u);
    std::set<std::string> starts;
    for (const OrderedJson& row : rows) {
      const std::string text = answer(row);
      EXPECT_FALSE(text.empty());
      EXPECT_LE(std::count(text.begin(), text.end(), ' '), 4) << text;
      EXPECT_LT(question(row).size(), 160u);
      EXPECT_EQ(question(row).find('{'), std::string::npos) << question(row);
      starts.insert(question(row).substr(0, 7));
    }
    EXPECT_GE(starts.size(), 2u) << skill.name;
  }
}

TEST(Skills, TrainAndTestAreDisjointForAllSeeds) {
  for (const Skill& skill : skills()) {
    if (skill.held_out) continue;
    std::set<std::string> train;
    for (uint64_t seed : {1, 2, 3}) {
      for (const OrderedJson& row : generate_skill(skill.name, "train", 100, seed)) train.insert(question(row));
    }
    for (uint64_t seed : {1, 2, 4}) {
      for (const OrderedJson& row : generate_skill(skill.name, "test", 30, seed)) {
        EXPECT_FALSE(train.contains(question(row))) << question(row);
      }
    }
  }
}

TEST(Skills, AQuestionKeepsItsSplitInEveryWording) {
  // Day arithmetic has 280 questions in two wordings each; drawn until few are left, the amounts of the two splits
  // must not meet in any wording.
  auto contents = [](const char* split, int64_t count) {
    std::set<std::string> contents;
    for (const OrderedJson& row : generate_skill("day_arithmetic", split, count, 5)) {
      std::string text = question(row), number;
      for (char c : text) number += std::isdigit(static_cast<unsigned char>(c)) ? std::string(1, c) : "";
      bool back = text.find("ago") != std::string::npos || text.find("earlier") != std::string::npos;
      for (const char* day : {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}) {
        if (text.find(day) != std::string::npos)
          contents.insert(fmt::format("{} {} {}", day, back ? "-" : "+", number));
      }
    }
    EXPECT_EQ(static_cast<int64_t>(contents.size()), count);  // all different, whatever the wording
    return contents;
  };
  auto train = contents("train", 190), test = contents("test", 40);
  for (const std::string& content : test) EXPECT_FALSE(train.contains(content)) << content;
}

TEST(Skills, SameSeedSameRows) {
  EXPECT_EQ(generate_skill("maximum", "train", 20, 7), generate_skill("maximum", "train", 20, 7));
  EXPECT_NE(generate_skill("maximum", "train", 20, 7), generate_skill("maximum", "train", 20, 8));
}

TEST(Skills, AnswersAreRight) {
  int checked = 0;
  for (const OrderedJson& row : generate_skill("maximum", "train", 60, 3)) {
    std::string list = between(question(row), "Find the maximum: ", "");
    int best = 0;
    std::stringstream numbers(list);
    for (std::string number; std::getline(numbers, number, ',');) best = std::max(best, std::stoi(number));
    if (!list.empty()) EXPECT_EQ(answer(row), std::to_string(best)) << list;
    checked += !list.empty();
  }
  for (const OrderedJson& row : generate_skill("reverse_words", "train", 60, 3)) {
    std::string list = between(question(row), "Reverse the order of the words: ", "");
    std::stringstream words(list);
    std::string reversed;
    for (std::string word; words >> word;) reversed = word + (reversed.empty() ? "" : " ") + reversed;
    if (!list.empty()) EXPECT_EQ(answer(row), reversed);
    checked += !list.empty();
  }
  const std::vector<std::string> days{"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"};
  for (const OrderedJson& row : generate_skill("day_arithmetic", "train", 60, 3)) {
    std::string day = between(question(row), "Today is ", ". What day was it ");
    std::string shift = between(question(row), "What day was it ", " days ago");
    if (shift.empty()) continue;
    size_t today = std::find(days.begin(), days.end(), day) - days.begin();
    EXPECT_EQ(answer(row), days[(today + 700 - std::stoul(shift)) % 7]) << question(row);
    ++checked;
  }
  for (const OrderedJson& row : generate_skill("count_word", "train", 60, 3)) {
    std::string list = between(question(row), " in this list: ", ""),
                word = between(question(row), "the word \"", "\"");
    if (list.empty()) continue;
    int count = 0;
    std::stringstream words(list);
    for (std::string item; words >> item;) count += item == word;
    EXPECT_EQ(answer(row), std::to_string(count)) << question(row);
    ++checked;
  }
  for (const OrderedJson& row : generate_skill("inverse_lookup", "test", 60, 3)) {
    std::string price = between(question(row), "Which thing costs ", "?");
    if (price.empty()) continue;
    EXPECT_NE(question(row).find(answer(row) + " " + price), std::string::npos) << question(row);
    ++checked;
  }
  EXPECT_GE(checked, 60);
}

class SkillFiles : public data::FolderTest {};

TEST_F(SkillFiles, AreReadAsDatasets) {
  write_skills(folder_ / "skills", 12, 5, 1);
  auto configs =
      data::resolve_datasets(Json::parse(R"(["lookup", "lookup_test", "minimum_test"])"), folder_ / "skills");
  EXPECT_EQ(read_all(configs[0]).size(), 12u);
  EXPECT_EQ(read_all(configs[1]).size(), 5u);
  EXPECT_EQ(read_all(configs[2])[0].messages.size(), 2u);
  EXPECT_THROW(data::resolve_datasets("minimum", folder_ / "skills"), UsageError);  // held out: no train file
}

TEST_F(SkillFiles, AreThereInTheNumbersOfTheDemoOrNotAtAll) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    write_skills(folder_ / std::to_string(seed), kTrainRows, kTestRows, seed);
    EXPECT_TRUE(std::filesystem::exists(folder_ / std::to_string(seed) / "dataset_info.json"));
  }
  EXPECT_THROW(write_skills(folder_ / "none", 400, kTestRows, 1), UsageError);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "none"));
}

TEST(Skills, Errors) {
  EXPECT_THAT([] { generate_skill("maxmum", "train", 1, 1); }, ThrowsMessage<UsageError>(HasSubstr("known: reverse")));
  EXPECT_THROW(generate_skill("maximum", "dev", 1, 1), UsageError);
  EXPECT_THROW(generate_skill("minimum", "train", 1, 1), UsageError);
  EXPECT_THAT([] { generate_skill("day_arithmetic", "test", 1000, 1); },
              ThrowsMessage<UsageError>(HasSubstr("only about")));
}

}  // namespace
}  // namespace moesaic::demos
