#include "moesaic/eval/task_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/eval/suite.h"
#include "tests/temporary_folder.h"

namespace moesaic::eval {
namespace {
namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TaskFileKeys : public ::testing::Test {
 protected:
  std::string write(const std::string& name, const std::string& text) {
    fs::create_directories((folder_.path() / name).parent_path());
    std::ofstream(folder_.path() / name) << text;
    return (folder_.path() / name).string();
  }
  TaskOptions options() const { return {.data_dir = folder_.path()}; }

  std::vector<Task> tasks(const std::string& name) { return load_tasks({name}, options()); }

  std::string error_of(const std::string& yaml, const TaskOptions* with = nullptr) {
    try {
      load_tasks({write("bad.yaml", yaml)}, with ? *with : options());
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  test::TemporaryFolder folder_;
};

std::string prompt_of(const Item& item) { return item.messages[0]["content"].get<std::string>(); }

constexpr const char* kChoices = R"(task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: more.jsonl}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
output_type: multiple_choice
description: "Name it.\n"
doc_to_text: "Q: {{question | trim}}\nA:"
doc_to_choice: "{{[first, second]}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.5}
)";

TEST_F(TaskFileKeys, ChoicesComeFromTemplatesColumnsAndIndices) {
  write("rows.jsonl", R"({"question": " sky ", "first": "it's \"blue\"", "second": "red", "label": 0})"
                      "\n"
                      R"({"question": "blood", "first": "blue", "second": "red", "label": 1})"
                      "\n");
  write("more.jsonl", R"({"question": "grass", "first": "green", "second": "red", "label": 0})");
  const std::string path = write("colours.yaml", kChoices);
  const Task task = load_tasks({path}, options())[0];
  EXPECT_EQ(task.name, "colours");
  EXPECT_EQ(task.version, 2.5);
  EXPECT_THAT(task.metrics, ElementsAre("acc"));
  ASSERT_EQ(task.items.size(), 2u);
  EXPECT_EQ(prompt_of(task.items[0]), "Name it.\nQ: sky\nA:");
  EXPECT_THAT(task.items[0].choices, ElementsAre("it's \"blue\"", "red"));
  EXPECT_THAT(task.items[0].targets, ElementsAre("it's \"blue\""));
  EXPECT_THAT(task.items[1].targets, ElementsAre("red"));

  TaskOptions shown = options();
  shown.num_fewshot = 1;
  const Task with_example = load_tasks({path}, shown)[0];
  EXPECT_EQ(prompt_of(with_example.items[1]), "Name it.\nQ: grass\nA: green\n\nQ: blood\nA:");
  EXPECT_EQ(with_example.num_fewshot, 1);
  shown.num_fewshot = 2;
  EXPECT_THAT(error_of(kChoices, &shown), HasSubstr("--num_fewshot 2: "));

  TaskOptions writing = options();
  writing.generate = true;
  EXPECT_FALSE(load_tasks({path}, writing)[0].ranked());
}

TEST_F(TaskFileKeys, TargetsOfChoicesAreIndicesOrTexts) {
  write("rows.jsonl", R"({"q": "x", "answer": "1", "yes": true})"
                      "\n");
  auto target = [&](const std::string& choices, const std::string& of) {
    const std::string path =
        write("t.yaml",
              "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
              "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: " +
                  choices + "\ndoc_to_target: " + of + "\n");
    return tasks(path)[0].items[0].targets[0];
  };
  EXPECT_EQ(target("[a, b]", "\"{{answer}}\""), "b");   // digits that a template makes are an index,
  EXPECT_EQ(target("['0', '1', '2']", "answer"), "1");  // those of a column are a text
  EXPECT_EQ(target("[no, yes]", "yes"), "yes");         // true is 1
  EXPECT_EQ(target("[no, yes]", "0"), "no");
  EXPECT_EQ(target("[no, ' yes ']", "\"{{ 'yes' }}\""), "yes");  // blanks apart
  EXPECT_THROW(target("[a, b]", "\"{{ 7 }}\""), DataError);
  EXPECT_THROW(target("[a, b]", "\"{{ 'c' }}\""), DataError);
}

TEST_F(TaskFileKeys, RowsAreChosenAndGetFields) {
  write("rows.jsonl", R"({"n": 1, "in": {"x": "a"}})"
                      "\n"
                      R"({"n": 2, "in": {"x": "b"}})"
                      "\n");
  const Task task = tasks(write("t.yaml", R"(task: t
dataset_path: json
dataset_kwargs: {data_files: {test: "ro*.jsonl"}}
test_split: test
process_docs: {select: n > 1, fields: {flat: in.x, twice: n * 2}}
output_type: generate_until
doc_to_text: "{{flat}}{{twice}}\n"
doc_to_target: "{{ [flat, 'c'] }}"
generation_kwargs: {until: [stop], max_gen_toks: 3, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
)"))[0];
  ASSERT_EQ(task.items.size(), 1u);
  EXPECT_EQ(task.available, 1);
  EXPECT_EQ(prompt_of(task.items[0]), "b4\n");  // a line end at the end stays
  EXPECT_THAT(task.items[0].targets, ElementsAre("b", "c"));
  EXPECT_THAT(task.stop, ElementsAre("stop"));
  EXPECT_EQ(task.max_new_tokens, 3);
}

TEST_F(TaskFileKeys, BuiltInTasksAreNamedAndExtended) {
  write("gsm8k/test.jsonl", R"({"question": "How much?", "answer": "#### 1,200"})");
  EXPECT_EQ(prompt_of(tasks("gsm8k")[0].items[0]), "Question: How much?\nAnswer:");
  write("mgsm/mgsm_de.tsv", "Wie viel?\t3\n");
  const std::string mine = write("mine.yaml", "include: mgsm_direct_de\ntask: mine\ndescription: \"Kurz!\\n\"\n");
  EXPECT_EQ(prompt_of(tasks(mine)[0].items[0]), "Kurz!\nFrage: Wie viel?\nAntwort:");
  EXPECT_EQ(tasks(mine)[0].name, "mine");
  for (const char* language : {"bn", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"}) {
    write(fmt::format("mgsm/mgsm_{}.tsv", language), "?\t3\n");
  }
  EXPECT_EQ(tasks("mgsm_direct").size(), 11u);
  EXPECT_THAT([&] { tasks("humaneval"); }, ::testing::ThrowsMessage<UsageError>(
                                               AllOf(HasSubstr("humaneval/HumanEval.jsonl"), HasSubstr("--data_dir"))));
  EXPECT_THAT([&] { tasks("gsmk8"); }, ::testing::ThrowsMessage<UsageError>(HasSubstr("no built-in task")));
  EXPECT_THAT([&] { tasks("t0"); }, ::testing::ThrowsMessage<UsageError>(HasSubstr("--suite t0")));
}

TEST_F(TaskFileKeys, WhatIsWrongIsNamedWithItsLine) {
  write("rows.jsonl", R"({"question": "sky", "first": "blue", "second": "red", "label": 0})"
                      "\n");
  auto changed = [&](const std::string& from, const std::string& to) {
    std::string yaml = kChoices;
    yaml.replace(yaml.find(from), from.size(), to);
    return error_of(yaml);
  };
  EXPECT_THAT(changed("description:", "doc_to_image:"),
              AllOf(HasSubstr("bad.yaml:8: 'doc_to_image'"), HasSubstr("Supported are")));
  EXPECT_THAT(changed("test_split: test", "test_splitt: test"), HasSubstr("bad.yaml:4: 'test_splitt' (did you mean"));
  EXPECT_THAT(changed("multiple_choice", "loglikelihood"),
              HasSubstr("bad.yaml:7: output_type: got \"loglikelihood\", expected generate_until or multiple_choice"));
  EXPECT_THAT(changed("| trim", "| nothing"), HasSubstr("bad.yaml:9: doc_to_text"));
  EXPECT_THAT(changed("{{question | trim}}", "{{question"), HasSubstr("bad.yaml:9: doc_to_text"));
  EXPECT_THAT(changed("metric: acc", "metric: f1"), HasSubstr("bad.yaml:12: metric: got \"f1\", expected one of acc"));
  EXPECT_THAT(changed("aggregation: mean", "aggregation: median"), HasSubstr("bad.yaml:12: aggregation"));
  EXPECT_THAT(changed("metric: acc,", "metric: acc, ignore_case: true,"), HasSubstr("bad.yaml:12: 'ignore_case'"));
  EXPECT_THAT(changed("test: rows.jsonl", "test: none.jsonl"), HasSubstr("none.jsonl"));
  EXPECT_THAT(changed("question |", "quest |"),
              AllOf(HasSubstr("rows.jsonl"), HasSubstr("line 1: "), HasSubstr("bad.yaml:9: doc_to_text")));
  EXPECT_THAT(changed("doc_to_choice: \"{{[first, second]}}\"", "doc_to_choice: first"),
              HasSubstr("line 1: doc_to_choice: got \"blue\", expected a list of texts"));
  EXPECT_THAT(changed("label", "\"{{ [label }}\""), HasSubstr("bad.yaml:11: doc_to_target"));
  EXPECT_THAT(error_of("task: [\n"), AllOf(HasSubstr("bad.yaml"), HasSubstr("line")));
  EXPECT_THAT(error_of("task: x\ninclude: nowhere\n"), HasSubstr("bad.yaml:2: include"));
  EXPECT_THAT(error_of("task: x\ninclude: bad.yaml\n"), HasSubstr("bad.yaml:2: include"));
  EXPECT_THAT(error_of("task: x\nprocess_results: !function utils.f\n"), HasSubstr("bad.yaml:2"));
}

}  // namespace
}  // namespace moesaic::eval
