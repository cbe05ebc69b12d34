// Files as records: one JSON object per row, whatever the file type, in bounded memory and in any order.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::data {

/// A data file. Text files (.json, .jsonl, .csv) are indexed as they are read: one entry for each block of 64 records
/// or 1 MiB; .parquet and .arrow are read by row group and batch.
class RecordFile {
 public:
  virtual ~RecordFile() = default;

  /// By the file's ending: .json (an array of objects, a Super-NaturalInstructions task, or JSON Lines), .jsonl
  /// (.ndjson), .csv, .parquet, .arrow (.feather; file or stream format).
  /// Throws UsageError for another ending, DataError when the file can't be opened or its frame is damaged.
  static std::unique_ptr<RecordFile> open(const std::filesystem::path& path);

  /// Whether record `row` exists; reads a text file no further than needed to know.
  virtual bool has(int64_t row) = 0;
  /// Number of records; reads a text file to its end once.
  virtual int64_t rows() = 0;
  /// Record `row`, which exists. Throws DataError with the place when it is damaged.
  virtual OrderedJson read(int64_t row) = 0;
  /// File and line (or row) for messages.
  virtual std::string where(int64_t row) = 0;
  /// Rows at which the units begin that are cheap to read in any order, and at the end the number of rows.
  virtual std::vector<int64_t> blocks() = 0;
  /// What stands around the records: a Super-NaturalInstructions file's "Definition"; null otherwise.
  virtual const OrderedJson& header() const;
};

std::unique_ptr<RecordFile> open_text_file(const std::filesystem::path& path, const std::string& extension);
std::unique_ptr<RecordFile> open_arrow_file(const std::filesystem::path& path, const std::string& extension);

}  // namespace moesaic::data
