// Looks at every row of a data set and says everything that is wrong with it.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "moesaic/data/dataset.h"

namespace moesaic::data {

struct Validation {
  std::string name;        // of the data set
  std::string formatting;  // what the file was read as
  int64_t rows = 0;
  int64_t damaged = 0;
  int64_t unanswered = 0;             // rows that leave nothing to learn; training skips them
  std::vector<std::string> problems;  // of the first damaged rows: file, place and reason
};

struct ValidateOptions {
  size_t max_problems = 20;
  const Renderer* renderer = nullptr;          // given: rows are also rendered, as training will
  std::function<void(int64_t rows)> progress;  // rows judged since the last call; what it throws ends the judging
};

/// Rows are judged by as many threads as ATen has, and the result is remembered while the files, the program and what
/// it renders with stay the same. Throws DataError when the file as a whole can't be read.
Validation validate(const DatasetConfig& config, const ValidateOptions& options = {});

/// Does with damaged rows what on_bad_row says: throws one DataError that names them, or warns that they are left out.
void settle_bad_rows(const std::vector<Validation>& judged, const RenderOptions& options);

}  // namespace moesaic::data
