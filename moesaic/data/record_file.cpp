#include "moesaic/data/record_file.h"

#include <algorithm>
#include <cctype>

namespace moesaic::data {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTextExtensions[] = {".json", ".jsonl", ".ndjson", ".csv", ".tsv"};
constexpr const char* kArrowExtensions[] = {".parquet", ".arrow", ".feather"};
constexpr const char* kExpected = ".json, .jsonl, .csv or .tsv (also with .gz or .zst behind), .parquet or .arrow";

std::string lower_extension(const fs::path& path) {
  std::string text = path.extension().string();
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

/// Of a compressed file the ending in front of the compression's.
std::string extension_of(const fs::path& path) {
  const std::string last = lower_extension(path);
  return last == ".gz" || last == ".zst" ? lower_extension(path.stem()) : last;
}

bool is_one_of(const std::string& extension, const auto& known) {
  return std::find(std::begin(known), std::end(known), extension) != std::end(known);
}

bool is_data_file(const fs::path& path) {
  return is_one_of(extension_of(path), kTextExtensions) || is_one_of(lower_extension(path), kArrowExtensions);
}

/// Files one behind the other.
class FileSeries : public RecordFile {
 public:
  explicit FileSeries(const std::vector<fs::path>& paths) {
    for (const fs::path& path : paths) files_.push_back(RecordFile::open(path));
  }

  bool has(int64_t row) override { return locate(row).first < files_.size(); }

  int64_t rows() override {
    int64_t rows = 0;
    for (const auto& file : files_) rows += file->rows();
    return rows;
  }

  OrderedJson read(int64_t row) override {
    const auto [file, inside] = locate(row);
    return files_.at(file)->read(inside);
  }

  std::string where(int64_t row) override {
    const auto [file, inside] = locate(row);
    return files_.at(file)->where(inside);
  }

  std::vector<int64_t> blocks() override {
    std::vector<int64_t> starts{0};
    for (const auto& file : files_) {
      const int64_t first = starts.back();
      for (const int64_t start : file->blocks()) {
        if (first + start > starts.back()) starts.push_back(first + start);
      }
    }
    return starts;
  }

 private:
  /// The file and the row in it; the number of files behind the last row.
  std::pair<size_t, int64_t> locate(int64_t row) {
    size_t file = 0;
    while (file < files_.size() && !files_[file]->has(row)) row -= files_[file++]->rows();
    return {file, row};
  }

  std::vector<std::unique_ptr<RecordFile>> files_;
};

}  // namespace

const OrderedJson& RecordFile::header() const {
  static const OrderedJson kNone;
  return kNone;
}

bool is_saved_dataset(const fs::path& folder) {
  std::error_code error;
  if (!fs::is_regular_file(folder / "state.json", error)) return false;
  const Json state = read_json(folder / "state.json");
  return state.is_object() && state.contains("_data_files");
}

std::vector<fs::path> data_files(const fs::path& folder) {
  std::vector<fs::path> files;
  if (is_saved_dataset(folder)) {
    const std::string where = (folder / "state.json").string();
    const Json state = read_json(folder / "state.json");
    MOESAIC_CHECK(state.value("_indices_data_files", Json()).empty(), DataError,
                  "{}: its rows are chosen by an index beside the data\nhint: save it again with a newer version of "
                  "datasets, or after flatten_indices()",
                  where);
    for (const Json& file : get<Json>(state, "_data_files", where)) {
      const fs::path name = get<std::string>(file, "filename", where);
      MOESAIC_CHECK(name == name.filename(), DataError, "{}: got the file name '{}', expected one without a folder",
                    where, name.string());
      files.push_back(folder / name);
    }
    MOESAIC_CHECK(!files.empty(), DataError, "{}: lists no data files", where);
    return files;
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.is_regular_file() && is_data_file(entry.path()) && entry.path().filename() != "dataset_info.json") {
      files.push_back(entry.path());
    }
  }
  MOESAIC_CHECK(!files.empty(), UsageError, "{}: no data files in this folder; expected {}", folder.string(),
                kExpected);
  std::sort(files.begin(), files.end());
  return files;
}

std::unique_ptr<RecordFile> RecordFile::open(const fs::path& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    const std::vector<fs::path> files = data_files(path);
    return files.size() == 1 ? open(files.front()) : std::make_unique<FileSeries>(files);
  }
  MOESAIC_CHECK(fs::is_regular_file(path, error), DataError, "{}: no such data file", path.string());
  const std::string extension = extension_of(path);
  if (is_one_of(extension, kTextExtensions)) return open_text_file(path, extension);
  if (is_data_file(path)) return open_arrow_file(path, extension);
  throw UsageError(
      fmt::format("{}: data files end in {}; got '{}'", path.string(), kExpected, path.extension().string()));
}

}  // namespace moesaic::data
