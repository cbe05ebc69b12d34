#include "moesaic/data/validate.h"

namespace moesaic::data {

Validation validate(const DatasetConfig& config, size_t max_problems) {
  auto reader = RowReader::open(config);
  Validation result;
  result.formatting = reader->formatting();
  result.rows = reader->count();
  for (int64_t i = 0; i < result.rows; ++i) {
    reader->seek(i);
    try {
      std::optional<Row> row = reader->next();
      bool answered = !row->target.empty();
      for (const OrderedJson& message : row->messages) {
        if (message.at("role") == "assistant")
          answered |= message.contains("tool_calls") || message.at("content") != "";
      }
      result.unanswered += !answered;
    } catch (const DataError& error) {
      if (result.problems.size() < max_problems) result.problems.push_back(error.what());
      ++result.damaged;
    }
  }
  return result;
}

}  // namespace moesaic::data
