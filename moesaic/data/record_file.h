// Files as records: one JSON object per row, whatever the file type, in bounded memory and in any order.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::data {

/// A data file, or several one behind the other. Text files (.json, .jsonl, .csv, .tsv) are indexed as they are read:
/// one entry for each block of 64 records or 1 MiB; .parquet and .arrow are read by row group and batch.
class RecordFile {
 public:
  virtual ~RecordFile() = default;

  /// By the file's ending: .json (an array of objects, a Super-NaturalInstructions task, or JSON Lines), .jsonl
  /// (.ndjson), .csv, .tsv, each also behind gzip (.gz) or Zstandard (.zst), .parquet, .arrow (.feather; file or stream
  /// format). A folder is its data files one behind the other.
  /// Throws UsageError for another ending, DataError when the file can't be opened or its frame is damaged.
  static std::unique_ptr<RecordFile> open(const std::filesystem::path& path);

  /// Whether record `row` exists; reads a text file no further than needed to know.
  virtual bool has(int64_t row) = 0;
  /// Number of records; reads a text file to its end once.
  virtual int64_t rows() = 0;
  /// Record `row`, which exists. A value that is no text, number, list or struct (bytes, a map) is a binary value whose
  /// bytes say what it is. Throws DataError with the place when it is damaged.
  virtual OrderedJson read(int64_t row) = 0;
  /// File and line, or row where lines don't tell rows apart, for messages.
  virtual std::string where(int64_t row) = 0;
  /// Rows at which the units begin that are cheap to read in any order, and at the end the number of rows.
  virtual std::vector<int64_t> blocks() = 0;
  /// What stands around the records: a Super-NaturalInstructions file's "Definition"; null otherwise.
  virtual const OrderedJson& header() const;
};

/// The data files of a folder: those its state.json lists (datasets' save_to_disk), else every one in the order of
/// their names. Throws UsageError when there are none.
std::vector<std::filesystem::path> data_files(const std::filesystem::path& folder);
/// Whether datasets' save_to_disk wrote this folder: one data set in one or several files.
bool is_saved_dataset(const std::filesystem::path& folder);

/// `extension` is that in front of a compressed file's.
std::unique_ptr<RecordFile> open_text_file(const std::filesystem::path& path, const std::string& extension);
std::unique_ptr<RecordFile> open_arrow_file(const std::filesystem::path& path, const std::string& extension);

}  // namespace moesaic::data
