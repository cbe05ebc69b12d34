#include "moesaic/data/record_file.h"

#include <algorithm>
#include <cctype>

namespace moesaic::data {

const OrderedJson& RecordFile::header() const {
  static const OrderedJson kNone;
  return kNone;
}

std::unique_ptr<RecordFile> RecordFile::open(const std::filesystem::path& path) {
  std::error_code error;
  MOESAIC_CHECK(std::filesystem::is_regular_file(path, error), DataError, "{}: no such data file", path.string());
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  if (extension == ".json" || extension == ".jsonl" || extension == ".ndjson" || extension == ".csv") {
    return open_text_file(path, extension);
  }
  if (extension == ".parquet" || extension == ".arrow" || extension == ".feather") {
    return open_arrow_file(path, extension);
  }
  throw UsageError(
      fmt::format("{}: data files end in .json, .jsonl, .csv, .parquet or .arrow; got '{}'", path.string(), extension));
}

}  // namespace moesaic::data
