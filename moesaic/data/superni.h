// Super-NaturalInstructions split into what is trained on and what is held out.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace moesaic::data {

struct SuperniOptions {
  /// Categories that no task is trained of.
  std::vector<std::string> held_out{"Textual Entailment", "Coreference Resolution", "Cause Effect Classification",
                                    "Word Semantics",     "Text Completion",        "Coherence Classification"};
  int64_t test_rows = 20;     // instances of each trained task that are held out
  int64_t held_out_rows = 0;  // instances of each task of these categories, drawn; 0 = all
  int64_t max_chars = 0;      // instances of more characters, definition included, are left out; 0 = none
  uint64_t seed = 42;
};

/// What became of the tasks of a category.
struct SuperniCategory {
  std::string name;
  bool held_out;
  int64_t tasks = 0, rows = 0, test_rows = 0;
};

/// Reads every task file (.json) of `tasks` and writes task files of the same kind:
///
///   OUT/train/<task>.json               instances to train on
///   OUT/test/<task>.test.json           instances of the same tasks that are not
///   OUT/held_out/<task>.held_out.json   tasks of the held-out categories
///
/// A task is of the category that its file names first. Which instances are drawn follows from the seed and the task's
/// name. A task of which max_chars leaves no instance to train on is left out.
/// Throws DataError for a file that is no task, UsageError for a category that no task has, naming those there are.
/// Source: Wang et al., "Super-NaturalInstructions", 2022; the default categories are those of T0's evaluation.
std::vector<SuperniCategory> split_superni(const std::filesystem::path& tasks, const std::filesystem::path& out,
                                           const SuperniOptions& options);

}  // namespace moesaic::data
