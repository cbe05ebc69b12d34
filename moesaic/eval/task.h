// Evaluation tasks: files of questions with either a set of choices (rank classification) or free answers (generation).
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::eval {

/// What an answer that is code continues, and the tests that it has to pass.
struct ProgramFrame {
  std::string before, tests;
};

/// One question.
struct Item {
  OrderedJson doc;                      // the file's record, for the sample log
  OrderedJson messages;                 // the conversation before the answer: [{role, content}]
  OrderedJson tools{};                  // the tools it may call, or null
  std::vector<std::string> choices;     // empty: the answer is generated
  std::vector<std::string> targets;     // accepted answers, at least one; a choice is right when it is one of them
  std::string variant;                  // prompt template of the row ("" = none): scored apart as well
  std::vector<float> sentence;          // router input `sentence`, when the file has it
  std::optional<ProgramFrame> program;  // the answer is Python code
};

/// Questions of one kind, of one data set.
struct Task {
  std::string name;  // the data file's without its ending, or what a task file says
  std::filesystem::path path;
  std::vector<Item> items;
  int64_t available = 0;    // questions in the file, before `limit`
  int64_t num_fewshot = 0;  // solved examples in each prompt
  OrderedJson version = 1;
  // Of generated answers, where the user does not say otherwise:
  std::vector<std::string> metrics{"exact_match", "f1", "rougeL"};
  std::vector<std::string> stop{};  // texts that end the answer to a raw prompt
  int64_t max_new_tokens = 128;
  // Of ranked choices:
  std::optional<std::string> target_delimiter;  // nullopt: as the user or the adapter has it
  bool score_eos = false;
  bool ranked() const { return !items.empty() && !items[0].choices.empty(); }
  bool code() const { return !items.empty() && items[0].program.has_value(); }
};

/// Tasks whose scores make one row.
struct Suite {
  /// A data set: `tasks` of the tasks, those behind the columns before.
  struct Column {
    std::string name;
    size_t tasks = 1;
  };
  std::string name;
  std::vector<Column> columns;
  std::vector<Task> tasks;
};

struct TaskOptions {
  int64_t limit = 0;                     // rows per task at most, the file's first ones; 0 = all
  std::optional<int64_t> num_fewshot{};  // solved examples in the prompt; nullopt: the task's own number
  bool generate = false;                 // let the model write even where the answers are a closed set
  std::filesystem::path data_dir = ".";  // where the files lie that task files name
};

/// Reads tasks. A name is that of a built-in task, or a tag of some (task_file.h), unless it is a path: to a task file
/// (.yaml), or to a data file or a folder of them (every .json, .jsonl and .tsv in it, by name). Shapes of data files:
///
///   {inputs, answer_choices[], target(s), template?}   P3 rendered; null choices: generation
///   {query, choices[], gold}                           multiple choice with the right one's index
///   {Definition, Instances[{id, input, output[]}]}     Super-NaturalInstructions. When its instances share a small set
///       of answers (at most 20 and at most a sixteenth of the instances), these are the choices.
///   {examples[{input, target}]}                        BIG-bench Hard: generation
///   {prompt, test, entry_point}                        the built-in task humaneval
///   {task_id, text, code, test_list[]}                 mbpp
///   {question, answer}, a number behind "####"         gsm8k
///   question <tab> number, no header (.tsv)            mgsm_direct_*, in the language that the file's name ends in
///   anything that training reads (messages, alpaca, ...): generation of the last answer
///
/// Throws UsageError for a missing path, DataError with file and place for damaged rows, all of a file's in one
/// message.
std::vector<Task> load_tasks(const std::vector<std::string>& names, const TaskOptions& options);

}  // namespace moesaic::eval
