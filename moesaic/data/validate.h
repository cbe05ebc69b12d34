// Looks at every row of a data file and says everything that is wrong with it.
#pragma once
#include <string>
#include <vector>

#include "moesaic/data/dataset.h"

namespace moesaic::data {

struct Validation {
  std::string formatting;  // what the file was read as
  int64_t rows = 0;
  int64_t damaged = 0;
  int64_t unanswered = 0;             // rows without an answer; training skips them
  std::vector<std::string> problems;  // the messages of the first `max_problems` damaged rows
};

/// Throws DataError when the file as a whole can't be read.
Validation validate(const DatasetConfig& config, size_t max_problems = 20);

}  // namespace moesaic::data
