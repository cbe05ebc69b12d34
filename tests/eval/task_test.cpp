#include "moesaic/eval/task.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace moesaic::eval {
namespace {
namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TaskFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::path(::testing::TempDir()) /
           fmt::format("moesaic_task_{}_{}", ::testing::UnitTest::GetInstance()->current_test_info()->name(), getpid());
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name) << text;
    return (dir_ / name).string();
  }
  fs::path dir_;
};

std::string error_of(const std::vector<std::string>& paths, const TaskOptions& options = {}) {
  try {
    load_tasks(paths, options);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST_F(TaskFiles, P3RowsAreRankedByTemplate) {
  const std::string path =
      write("rte.jsonl", R"({"template": "t1", "inputs": "Is it?", "answer_choices": ["Yes", "No"], "target": " No\n"})"
                         "\n\n"
                         R"({"template": "t2", "inputs": "So?", "answer_choices": ["A", "B", "C"], "target": "C"})"
                         "\n");
  const std::vector<Task> tasks = load_tasks({path}, {});
  ASSERT_EQ(tasks.size(), 1u);
  EXPECT_EQ(tasks[0].name, "rte");
  EXPECT_TRUE(tasks[0].ranked());
  ASSERT_EQ(tasks[0].items.size(), 2u);
  EXPECT_EQ(tasks[0].items[0].messages, OrderedJson::parse(R"([{"role": "user", "content": "Is it?"}])"));
  EXPECT_THAT(tasks[0].items[0].choices, ElementsAre("Yes", "No"));
  EXPECT_THAT(tasks[0].items[0].targets, ElementsAre("No"));
  EXPECT_EQ(tasks[0].items[1].variant, "t2");
}

TEST_F(TaskFiles, LimitKeepsTheFirstRowsAndCountsAll) {
  const std::string row = R"({"query": "q", "choices": ["a", "b"], "gold": 1})";
  const Task task = load_tasks({write("arc.jsonl", row + "\n" + row + "\n" + row + "\n")}, {.limit = 2})[0];
  EXPECT_EQ(task.items.size(), 2u);
  EXPECT_EQ(task.available, 3);
  EXPECT_THAT(task.items[0].targets, ElementsAre("b"));
}

TEST_F(TaskFiles, EveryDamagedRowIsNamedInOneMessage) {
  const std::string error = error_of({write("bad.jsonl", R"({"inputs": "q", "answer_choices": ["a"], "target": "z"})"
                                                         "\n"
                                                         R"({"inputs": 3, "answer_choices": ["a"], "target": "a"})"
                                                         "\n")});
  EXPECT_THAT(error, HasSubstr("bad.jsonl: 2 damaged rows"));
  EXPECT_THAT(error, HasSubstr("line 1: the target is none of the answer choices"));
  EXPECT_THAT(error, HasSubstr("line 2: \"inputs\" is missing or no text"));
}

std::string superni(int instances, const std::function<std::string(int)>& output) {
  OrderedJson file = {
      {"Definition", {"Say it."}},
      {"Positive Examples", {{{"input", "ex1"}, {"output", "out1"}}, {{"input", "ex2"}, {"output", "out2"}}}},
      {"Instances", OrderedJson::array()}};
  for (int i = 0; i < instances; ++i) {
    file["Instances"].push_back({{"id", i}, {"input", fmt::format("in{}", i)}, {"output", {output(i)}}});
  }
  return file.dump();
}

TEST_F(TaskFiles, SuperNiWithFewAnswersIsRankedOverThem) {
  const std::string path = write("t.json", superni(32, [](int i) { return i % 2 ? "yes" : "no"; }));
  const Task task = load_tasks({path}, {})[0];
  ASSERT_TRUE(task.ranked());
  EXPECT_THAT(task.items[0].choices, ElementsAre("no", "yes"));
  EXPECT_EQ(task.items[0].messages[0]["content"], "Say it.\n\nin0");
  EXPECT_FALSE(load_tasks({path}, {.generate = true})[0].ranked());
}

TEST_F(TaskFiles, SuperNiWithManyAnswersIsGenerated) {
  // 3 answers on 32 instances are more than a sixteenth
  const Task task = load_tasks({write("t.json", superni(32, [](int i) { return std::to_string(i % 3); }))}, {})[0];
  EXPECT_FALSE(task.ranked());
  EXPECT_THAT(task.items[4].targets, ElementsAre("1"));
}

TEST_F(TaskFiles, SuperNiExamplesStandBeforeTheInput) {
  const std::string path = write("t.json", superni(2, [](int i) { return std::to_string(i); }));
  EXPECT_EQ(load_tasks({path}, {.num_fewshot = 2})[0].items[1].messages[0]["content"],
            "Say it.\n\nex1\nout1\n\nex2\nout2\n\nin1");
  EXPECT_THAT(error_of({path}, {.num_fewshot = 3}), HasSubstr("the task has 2 positive examples"));
}

TEST_F(TaskFiles, MessagesAskForTheLastAnswer) {
  const Task task =
      load_tasks({write("chat.jsonl",
                        R"({"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]})"
                        "\n")},
                 {})[0];
  EXPECT_FALSE(task.ranked());
  EXPECT_THAT(task.items[0].targets, ElementsAre("2"));
  EXPECT_EQ(task.items[0].messages.size(), 1u);
}

TEST_F(TaskFiles, FoldersGiveTheirFilesByName) {
  write("b.jsonl", R"({"query": "q", "choices": ["a"], "gold": 0})");
  write("a.jsonl", R"({"query": "q", "choices": ["a"], "gold": 0})");
  write("dataset_info.json", "{}");
  const std::vector<Task> tasks = load_tasks({dir_.string()}, {});
  ASSERT_EQ(tasks.size(), 2u);
  EXPECT_EQ(tasks[0].name, "a");
  EXPECT_EQ(tasks[1].name, "b");
}

TEST_F(TaskFiles, MissingPathIsTheUsersMistake) { EXPECT_THROW(load_tasks({"no/such/task.jsonl"}, {}), UsageError); }

TEST(SharedData, RealTasksLoad) {
  const char* given = std::getenv("MOESAIC_DATA_DIR");
  const fs::path data = given ? fs::path(given) : fs::path(MOESAIC_SOURCE_DIR) / "../shared/data";
  if (!fs::exists(data / "superni/eval")) GTEST_SKIP() << "no data set folder at " << data;
  const std::vector<Task> superni = load_tasks({(data / "superni/eval").string()}, {});
  EXPECT_EQ(superni.size(), 14u);
  // index.tsv names a closed label set for 10 of them
  EXPECT_EQ(std::count_if(superni.begin(), superni.end(), [](const Task& task) { return task.ranked(); }), 10);
  for (const Task& task : load_tasks({(data / "p3_rendered/eval").string()}, {}))
    EXPECT_TRUE(task.ranked()) << task.name;
}

}  // namespace
}  // namespace moesaic::eval
