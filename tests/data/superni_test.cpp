#include "moesaic/data/superni.h"

#include <gmock/gmock.h>

#include "moesaic/base/json.h"
#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class Superni : public FolderTest {
 protected:
  void task(const std::string& name, const std::string& category, int64_t instances) const {
    Json file{{"Categories", {category, "Other"}}, {"Definition", {"Answer."}}, {"Instances", Json::array()}};
    for (int64_t i = 0; i < instances; ++i) {
      file["Instances"].push_back(
          {{"id", fmt::format("{}-{}", name, i)}, {"input", std::string(10 * (i + 1), 'x')}, {"output", {"y"}}});
    }
    write("tasks/" + name + ".json", file.dump());
  }
  std::vector<std::string> ids(const std::string& path) const {
    std::vector<std::string> found;
    const Json file = read_json(folder_ / "out" / path);
    for (const Json& each : file["Instances"]) found.push_back(each["id"]);
    return found;
  }
  std::vector<SuperniCategory> split(const SuperniOptions& options) const {
    return split_superni(folder_ / "tasks", folder_ / "out", options);
  }
};

TEST_F(Superni, IsSplitByCategoryAndByInstance) {
  task("t1", "Question Answering", 6);
  task("t2", "Textual Entailment", 3);
  task("t3", "Question Answering", 2);  // as many as are held out: nothing is left to train on
  const auto categories = split({.test_rows = 2});
  ASSERT_EQ(categories.size(), 2U);
  EXPECT_EQ(categories[0].name, "Question Answering");
  EXPECT_THAT((std::vector{categories[0].tasks, categories[0].rows, categories[0].test_rows}), ElementsAre(1, 4, 2));
  EXPECT_TRUE(categories[1].held_out);
  auto all = ids("train/t1.json");
  const auto test = ids("test/t1.test.json");
  all.insert(all.end(), test.begin(), test.end());
  std::sort(all.begin(), all.end());
  EXPECT_THAT(all, ElementsAre("t1-0", "t1-1", "t1-2", "t1-3", "t1-4", "t1-5"));
  EXPECT_EQ(ids("held_out/t2.held_out.json").size(), 3U);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/train/t3.json"));
  // The rest of a task's file is carried; again is the same, another seed another draw, which is not written over it.
  EXPECT_EQ(read_json(folder_ / "out/test/t1.test.json")["Definition"], Json({"Answer."}));
  EXPECT_NO_THROW(split({.test_rows = 2}));
  EXPECT_THROW(split({.test_rows = 2, .seed = 43}), UsageError);
}

TEST_F(Superni, LongInstancesAreLeftOutAndHeldOutOnesDrawn) {
  task("t1", "Question Answering", 6);
  task("t2", "Textual Entailment", 6);
  split({.test_rows = 1, .held_out_rows = 2, .max_chars = 7 + 40});  // inputs of 10 to 40 characters
  EXPECT_EQ(ids("train/t1.json").size() + ids("test/t1.test.json").size(), 4U);
  EXPECT_EQ(ids("held_out/t2.held_out.json").size(), 2U);
}

TEST_F(Superni, WhatIsWrong) {
  EXPECT_THAT([&] { split({}); }, ThrowsMessage<UsageError>(HasSubstr("tasks: got no folder")));
  task("t1", "Question Answering", 6);
  EXPECT_THAT(
      [&] { split({.held_out = {"Answering"}}); },
      ThrowsMessage<UsageError>(HasSubstr("got 'Answering', expected categories of the tasks: Question Answering")));
  write("tasks/t2.json", "[]");
  EXPECT_THAT([&] { split({}); }, ThrowsMessage<DataError>(HasSubstr("t2.json: expected a task of Super-Natural")));
  std::filesystem::create_directories(folder_ / "tasks");
  EXPECT_THAT([&] { split_superni(folder_ / "tasks", folder_ / "tasks", {}); }, testing::Throws<UsageError>());
}

}  // namespace
}  // namespace moesaic::data
