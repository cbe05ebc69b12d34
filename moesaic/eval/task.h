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

/// One file of questions, all of one kind.
struct Task {
  std::string name;  // the file's name without its ending
  std::filesystem::path path;
  std::vector<Item> items;
  int64_t available = 0;  // questions in the file, before `limit`
  // Of generated answers, where the user does not say otherwise:
  std::vector<std::string> metrics{"exact_match", "f1", "rougeL"};
  std::vector<std::string> stop{};  // texts that end the answer to a raw prompt
  int64_t max_new_tokens = 128;
  bool ranked() const { return !items.empty() && !items[0].choices.empty(); }
  bool code() const { return !items.empty() && items[0].program.has_value(); }
};

struct TaskOptions {
  int64_t limit = 0;        // questions per task at most, the file's first ones; 0 = all
  int64_t num_fewshot = 0;  // solved examples in the prompt (Super-NaturalInstructions, MBPP)
  bool generate = false;    // let the model write even where the answers are a closed set
};

/// Reads tasks from files and folders (every .json, .jsonl and .tsv in it, by name). Shapes:
///
///   {inputs, answer_choices[], target(s), template?}   P3 rendered; null choices: generation
///   {query, choices[], gold}                           multiple choice with the right one's index
///   {Definition, Instances[{id, input, output[]}]}     Super-NaturalInstructions. When its instances share a small set
///       of answers (at most 20 and at most a sixteenth of the instances), these are the choices.
///   {examples[{input, target}]}                        BIG-bench Hard: generation
///   {prompt, test, entry_point}                        HumanEval: the prompt as it is, metric pass@1
///   {task_id, text, code, test_list[]}                 MBPP: its test split (ids 11 to 510), examples are ids 2 to 4
///   {question, answer}, a number behind "####"         GSM8K, metric number
///   question <tab> number, no header (.tsv)            MGSM, in the language that the file's name ends in (mgsm_sw)
///       Prompts, stops and lengths of these four are those of lm-evaluation-harness's humaneval, mbpp, gsm8k and
///       mgsm_direct.
///   anything that training reads (messages, alpaca, ...): generation of the last answer
///
/// Throws UsageError for a missing path, DataError with file and place for damaged rows, all of a file's in one
/// message.
std::vector<Task> load_tasks(const std::vector<std::string>& paths, const TaskOptions& options);

}  // namespace moesaic::eval
