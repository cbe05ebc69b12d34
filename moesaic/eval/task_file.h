// Tasks as data files: YAML with lm-evaluation-harness's keys, beside the program or in it (tasks/*.yaml).
#pragma once
#include <string_view>

#include "moesaic/eval/task.h"

namespace moesaic::eval {

/// A file of tasks/, as the build put it into the program.
struct BuiltIn {
  const char* name;  // the file's, without its ending
  std::string_view text;
};
extern const std::vector<BuiltIn> kBuiltIn;

/// Whether a built-in task has this name.
bool is_built_in(const std::string& name);

/// Whether the path's ending is a task file's.
bool is_task_file(const std::filesystem::path& path);

/// The task of a task file, the built-in one of this name, or all built-in ones with this tag. docs/cli.md has the
/// keys. Throws UsageError for an unknown name and for data that isn't there, FormatError with file and line for what
/// stands wrong in a task file, DataError for damaged rows, all in one message.
std::vector<Task> named_tasks(const std::string& name, const TaskOptions& options);

/// The tasks of a group's file, or of the built-in group of this name.
Suite load_suite(const std::string& name, const TaskOptions& options);

/// A built-in task over a data file of the user's, and named after it.
Task built_in_over(const std::string& name, const std::filesystem::path& data, const TaskOptions& options);

}  // namespace moesaic::eval
