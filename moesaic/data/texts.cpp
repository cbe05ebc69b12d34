#include "moesaic/data/texts.h"

namespace moesaic::data {

std::vector<std::string> plain_texts(const std::vector<DatasetConfig>& datasets, size_t max_bytes) {
  std::vector<std::string> texts;
  for (const DatasetConfig& config : datasets) {
    const size_t share = max_bytes / datasets.size();
    size_t bytes = 0;
    auto add = [&](const std::string& text) {
      if (text.empty() || bytes + text.size() > share) return;
      bytes += text.size();
      texts.push_back(text);
    };
    const auto reader = RowReader::open(config);
    while (bytes < share) {
      const std::optional<Row> row = reader->next();
      if (!row) break;
      add(row->prompt);
      add(row->target);
      for (const OrderedJson& message : row->messages) {
        if (message.contains("content") && message["content"].is_string()) add(message["content"].get<std::string>());
      }
    }
  }
  return texts;
}

}  // namespace moesaic::data
