#include "moesaic/eval/task.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace moesaic::eval {
namespace {
namespace fs = std::filesystem;
using ::testing::AllOf;
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

std::string prompt_of(const Item& item) { return item.messages[0]["content"].get<std::string>(); }

TEST_F(TaskFiles, HumanEvalIsCompletedAndRun) {
  const OrderedJson row = {{"task_id", "HumanEval/0"},
                           {"prompt", "def one():\n"},
                           {"canonical_solution", "    return 1\n"},
                           {"test", "def check(f):\n    assert f() == 1\n"},
                           {"entry_point", "one"}};
  const Task task = load_tasks({write("humaneval.jsonl", row.dump() + "\n" + row.dump())}, {.limit = 1})[0];
  EXPECT_TRUE(task.code());
  EXPECT_THAT(task.metrics, ElementsAre("pass@1"));
  EXPECT_THAT(task.stop, ElementsAre("\nclass", "\ndef", "\n#", "\nif", "\nprint"));
  EXPECT_EQ(task.available, 2);
  ASSERT_EQ(task.items.size(), 1u);
  EXPECT_EQ(prompt_of(task.items[0]), "def one():\n");
  EXPECT_EQ(task.items[0].program->before, "def one():\n");
  EXPECT_EQ(task.items[0].program->tests, "\ndef check(f):\n    assert f() == 1\n\ncheck(one)");
}

OrderedJson mbpp_row(int id) {
  return {{"text", fmt::format("Write f{}.", id)},
          {"code", fmt::format("def f{}(): pass", id)},
          {"task_id", id},
          {"test_setup_code", id == 11 ? "import math" : ""},
          {"test_list", {fmt::format("assert f{}()", id), "assert True"}}};
}

TEST_F(TaskFiles, MbppTakesItsTestSplitAndExamples) {
  std::string lines;
  for (int id : {1, 2, 3, 4, 10, 11, 510, 511}) lines += mbpp_row(id).dump() + "\n";
  const std::string path = write("mbpp.jsonl", lines);
  const Task task = load_tasks({path}, {})[0];
  ASSERT_EQ(task.items.size(), 2u);
  EXPECT_EQ(task.available, 2);
  EXPECT_THAT(task.stop, ElementsAre("[DONE]"));
  EXPECT_EQ(prompt_of(task.items[0]),
            "You are an expert Python programmer, and here is your task: Write f11. Your code should pass these "
            "tests:\n\nassert f11()\nassert True\n[BEGIN]\n");
  EXPECT_EQ(task.items[0].program->before, "");
  EXPECT_EQ(task.items[0].program->tests, "\nimport math\nassert f11()\nassert True");

  const std::string shown = prompt_of(load_tasks({path}, {.num_fewshot = 2})[0].items[0]);
  EXPECT_TRUE(shown.starts_with("You are an expert Python programmer, and here is your task: Write f2. Your"));
  EXPECT_THAT(shown, HasSubstr("\n[BEGIN]\ndef f2(): pass\n[DONE]\n\nYou are an expert Python programmer, and here is "
                               "your task: Write f3. "));
  EXPECT_THAT(shown, HasSubstr("def f3(): pass\n[DONE]\n\nYou are an expert Python programmer, and here is your task: "
                               "Write f11. "));
  EXPECT_THAT(error_of({path}, {.num_fewshot = 4}), HasSubstr("--num_fewshot 4: built-in mbpp.yaml has 3 examples"));
  EXPECT_THAT(error_of({write("train.jsonl", mbpp_row(700).dump())}),
              HasSubstr("no row is a question of the task mbpp"));
}

TEST_F(TaskFiles, Gsm8kAsksForTheNumberBehindTheMark) {
  const std::string row = R"({"question": "How much?", "answer": "3 * 4 = <<3*4=12>>12\n#### 1,200"})";
  const std::string path = write("gsm8k.jsonl", row + "\n");
  const Task task = load_tasks({path}, {})[0];
  EXPECT_EQ(prompt_of(task.items[0]), "Question: How much?\nAnswer:");
  EXPECT_THAT(task.items[0].targets, ElementsAre("1200"));
  EXPECT_THAT(task.metrics, ElementsAre("number"));
  EXPECT_THAT(error_of({path}, {.num_fewshot = 5}), HasSubstr("has no solved examples"));
  const std::string bad =
      write("bad.jsonl", row + "\n" + R"({"question": "Why?", "answer": "#### because"})" + "\n" + row);
  EXPECT_THAT(error_of({bad}), HasSubstr("line 2: doc_to_target: got \"because\", expected a number"));
}

TEST_F(TaskFiles, MgsmAsksInItsLanguage) {
  write("mgsm_sw.tsv", "Ngapi?\t18\nNgapi tena?\t1,000\n\n");
  write("mgsm_tn.tsv", "Di kae?\t-2.5\r\n");
  const std::vector<Task> tasks = load_tasks({dir_.string()}, {});
  ASSERT_EQ(tasks.size(), 2u);
  EXPECT_EQ(tasks[0].items.size(), 2u);
  EXPECT_EQ(prompt_of(tasks[0].items[0]), "Swali: Ngapi?\nAnswer:");
  EXPECT_THAT(tasks[0].stop, ElementsAre("Swali:"));
  EXPECT_THAT(tasks[0].items[1].targets, ElementsAre("1000"));
  EXPECT_EQ(prompt_of(tasks[1].items[0]), "Question: Di kae?\nAnswer:");  // no words of its own
  EXPECT_THAT(tasks[1].items[0].targets, ElementsAre("-2.5"));
  // U+FF1A, as in the harness.
  for (const auto& [name, word] : {std::pair("mgsm_ja.tsv", "問題"), std::pair("mgsm_zh.tsv", "问题")}) {
    const Task task = load_tasks({write(name, "3+4?\t7\n")}, {})[0];
    EXPECT_EQ(prompt_of(task.items[0]), std::string(word) + "\uff1a 3+4?\nAnswer:");
    EXPECT_THAT(task.stop, ElementsAre(std::string(word) + "\uff1a"));
  }
  EXPECT_THAT(error_of({write("lexicon.tsv", "water\tmetsi\nalone\n")}),
              AllOf(HasSubstr("2 damaged rows"), HasSubstr("line 1: doc_to_target: got \"metsi\", expected a number"),
                    HasSubstr("line 2: 1 columns between tabs, expected 2: question, answer")));
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
  EXPECT_EQ(load_tasks({(data / "humaneval").string()}, {})[0].items.size(), 164u);
  EXPECT_EQ(load_tasks({(data / "mbpp").string()}, {.num_fewshot = 3})[0].items.size(), 500u);
  EXPECT_EQ(load_tasks({(data / "gsm8k/test.jsonl").string()}, {})[0].items.size(), 1319u);
  for (const Task& task : load_tasks({(data / "mgsm").string()}, {})) EXPECT_EQ(task.items.size(), 250u) << task.name;
}

}  // namespace
}  // namespace moesaic::eval
