// .json, .jsonl, .csv and .tsv: finds where records begin and end without parsing them, and parses one when it is asked
// for.
#include <arrow/csv/options.h>
#include <arrow/csv/parser.h>
#include <arrow/io/compressed.h>
#include <arrow/io/file.h>
#include <arrow/util/compression.h>
#include <arrow/util/utf8.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>
#include <optional>

#include "moesaic/base/file_errors.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {
namespace {

constexpr int64_t kBlockRecords = 64;
constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr int64_t kMaxRecordBytes = int64_t{64} << 20;
constexpr int64_t kChunkBytes = int64_t{1} << 20;

enum class Kind { kJsonLines, kJsonArray, kCsv };

/// Bytes [begin, end) of a record and the line, from 1, on which it begins.
struct Span {
  int64_t begin = 0, end = 0, line = 1;
};

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

/// Finds the records in bytes that are fed in order. Knows just enough of each format to see its borders.
class Splitter {
 public:
  /// `offset`, `line`: place of the first byte to come; it lies between two records, in an array after '[' or ','.
  Splitter(Kind kind, int64_t offset, int64_t line, char delimiter = ',')
      : kind_(kind), offset_(offset), line_(line), delimiter_(delimiter) {}

  template <class OnRecord>
  void feed(std::string_view bytes, OnRecord&& on_record) {
    for (char c : bytes) {
      if (ended_) return;
      if (!open_ && !is_between(c)) {
        open_ = true;
        span_ = {offset_, 0, line_};
        quotes_ = Quotes::kFieldStart;
      }
      switch (kind_) {
        case Kind::kJsonLines:
          if (c == '\n') emit(on_record);
          break;
        case Kind::kCsv: step_csv(c, on_record); break;
        case Kind::kJsonArray: step_array(c, on_record); break;
      }
      if (c == '\n') ++line_;
      ++offset_;
    }
  }

  /// The end of the file: emits a last line without a line break. False when it ends inside a record or an array.
  template <class OnRecord>
  bool finish(OnRecord&& on_record) {
    if (kind_ == Kind::kJsonArray) return ended_;
    if (kind_ == Kind::kCsv && quotes_ == Quotes::kInside && open_) return false;
    emit(on_record);
    return true;
  }

  int64_t offset() const { return offset_; }
  int64_t line() const { return line_; }
  bool ended() const { return ended_; }
  /// Bytes of the record that has begun and not ended.
  int64_t open_bytes() const { return open_ ? offset_ - span_.begin : 0; }
  int64_t open_line() const { return open_ ? span_.line : line_; }

 private:
  enum class Quotes { kFieldStart, kField, kInside, kAfter };

  bool is_between(char c) const {
    if (kind_ == Kind::kCsv) return c == '\r' || c == '\n';
    return is_space(c) || (kind_ == Kind::kJsonArray && c == ']');
  }

  template <class OnRecord>
  void emit(OnRecord&& on_record) {
    if (!open_) return;
    span_.end = offset_;
    open_ = false;
    on_record(span_);
  }

  template <class OnRecord>
  void step_csv(char c, OnRecord&& on_record) {
    if (quotes_ == Quotes::kInside) {
      if (c == '"') quotes_ = Quotes::kAfter;
    } else if (c == '\n') {
      emit(on_record);
    } else if (c == '"' && quotes_ != Quotes::kField) {
      quotes_ = Quotes::kInside;
    } else {
      quotes_ = c == delimiter_ ? Quotes::kFieldStart : Quotes::kField;
    }
  }

  template <class OnRecord>
  void step_array(char c, OnRecord&& on_record) {
    if (in_string_) {
      if (escaped_)
        escaped_ = false;
      else if (c == '\\')
        escaped_ = true;
      else if (c == '"')
        in_string_ = false;
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '{' || c == '[') {
      ++depth_;
    } else if (depth_ > 0 && (c == '}' || c == ']')) {
      --depth_;
    } else if (depth_ == 0 && (c == ',' || c == ']')) {
      emit(on_record);
      ended_ = c == ']';
    }
  }

  Kind kind_;
  int64_t offset_, line_;
  char delimiter_;  // between the fields of a CSV file
  Span span_;
  bool open_ = false, ended_ = false;
  Quotes quotes_ = Quotes::kFieldStart;
  int depth_ = 0;
  bool in_string_ = false, escaped_ = false;
};

/// The fields of one CSV record. Throws DataError.
std::vector<std::string> parse_csv(std::string_view text, char delimiter, const std::string& where) {
  MOESAIC_CHECK(arrow::util::ValidateUTF8(text), DataError, "{}: not UTF-8 text", where);
  auto options = arrow::csv::ParseOptions::Defaults();
  options.delimiter = delimiter;
  options.newlines_in_values = true;
  arrow::csv::BlockParser parser(options, -1, -1, 1);
  uint32_t parsed = 0;
  arrow::Status status = parser.ParseFinal(text, &parsed);
  std::vector<std::string> fields;
  if (status.ok() && parser.num_rows() == 1) {
    status = parser.VisitLastRow([&](const uint8_t* data, uint32_t size, bool) {
      fields.emplace_back(reinterpret_cast<const char*>(data), size);
      return arrow::Status::OK();
    });
  }
  MOESAIC_CHECK(status.ok(), DataError, "{}: {}", where, status.message());
  return fields;
}

/// A file that is gone with its last reader.
class TemporaryFile {
 public:
  TemporaryFile() : path_((std::filesystem::temp_directory_path() / "moesaic-XXXXXX").string()) {
    const int descriptor = ::mkstemp(path_.data());
    MOESAIC_CHECK(descriptor >= 0, DataError, "{}: can't be made: {}", path_, refusal(errno));
    ::close(descriptor);
  }
  ~TemporaryFile() { ::unlink(path_.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

arrow::Status decompress(const std::string& from, arrow::Compression::type type, const std::string& to) {
  ARROW_ASSIGN_OR_RAISE(const auto codec, arrow::util::Codec::Create(type));
  ARROW_ASSIGN_OR_RAISE(const auto file, arrow::io::ReadableFile::Open(from));
  ARROW_ASSIGN_OR_RAISE(const auto in, arrow::io::CompressedInputStream::Make(codec.get(), file));
  ARROW_ASSIGN_OR_RAISE(const auto out, arrow::io::FileOutputStream::Open(to));
  while (true) {
    ARROW_ASSIGN_OR_RAISE(const auto bytes, in->Read(kChunkBytes));
    if (bytes->size() == 0) return out->Close();
    ARROW_RETURN_NOT_OK(out->Write(bytes));
  }
}

/// The plain bytes of a compressed file, shared by all who read it at the time; nullptr for one that is plain.
std::shared_ptr<const TemporaryFile> decompressed(const std::filesystem::path& path) {
  const bool gzip = path.extension() == ".gz" || path.extension() == ".GZ";
  if (!gzip && path.extension() != ".zst" && path.extension() != ".ZST") return nullptr;
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<const TemporaryFile>> known;
  const std::lock_guard lock(mutex);
  const std::string key =
      fmt::format("{} {} {}", std::filesystem::absolute(path).string(), std::filesystem::file_size(path),
                  std::filesystem::last_write_time(path).time_since_epoch().count());
  if (auto shared = known[key].lock()) return shared;
  const auto made = std::make_shared<const TemporaryFile>();
  const arrow::Status status =
      decompress(path.string(), gzip ? arrow::Compression::GZIP : arrow::Compression::ZSTD, made->path());
  const bool cut = status.message().find("Truncated") != std::string::npos;
  MOESAIC_CHECK(status.ok(), DataError, "{}: can't be decompressed: {}", path.string(),
                cut ? ends_early(std::filesystem::file_size(path)) : status.message());
  known[key] = made;
  return made;
}

class TextFile : public RecordFile {
 public:
  TextFile(const std::filesystem::path& path, const std::string& extension)
      : path_(path.string()),
        plain_(decompressed(path)),
        file_(plain_ ? plain_->path() : path_, std::ios::binary),
        delimiter_(extension == ".tsv" ? '\t' : ','),
        splitter_(Kind::kJsonLines, 0, 1) {
    MOESAIC_CHECK(file_.good(), DataError, "{}: can't be opened", path_);
    arrow::util::InitializeUTF8();
    int64_t begin = read_bytes(0, 3) == "\xEF\xBB\xBF" ? 3 : 0;
    if (extension == ".csv" || extension == ".tsv") {
      start_csv(begin);
    } else if (extension == ".json") {
      start_json(begin);
    } else {
      start(Kind::kJsonLines, begin, 1);
    }
  }

  bool has(int64_t row) override {
    while (!done_ && rows_ <= row) scan_chunk();
    return row < rows_;
  }

  int64_t rows() override {
    while (!done_) scan_chunk();
    return rows_;
  }

  OrderedJson read(int64_t row) override {
    Span span = find(row);
    const std::string place = place_of(row, span);
    std::string_view text = std::string_view(block_bytes_).substr(span.begin - block_begin_, span.end - span.begin);
    if (kind_ != Kind::kCsv) return parse_ordered_json(text, place);
    std::vector<std::string> fields = parse_csv(text, delimiter_, place);
    MOESAIC_CHECK(fields.size() == columns_.size(), DataError, "{}: got {} fields, expected {} as in the first line",
                  place, fields.size(), columns_.size());
    OrderedJson record = OrderedJson::object();
    for (size_t i = 0; i < fields.size(); ++i) record[columns_[i]] = std::move(fields[i]);
    return record;
  }

  std::string where(int64_t row) override { return place_of(row, find(row)); }
  std::vector<int64_t> blocks() override { return {0, rows()}; }
  const OrderedJson& header() const override { return header_; }

 private:
  struct Block {
    int64_t begin, line, first_row;
  };

  /// An array may be a single line, so its rows are counted.
  std::string place_of(int64_t row, const Span& span) const {
    if (kind_ == Kind::kJsonArray) return fmt::format("{} row {} (line {})", path_, row + 1, span.line);
    return fmt::format("{} line {}", path_, span.line);
  }

  std::string read_bytes(int64_t offset, int64_t size) {
    std::string bytes(static_cast<size_t>(size), '\0');
    file_.clear();
    file_.seekg(offset);
    file_.read(bytes.data(), size);
    bytes.resize(static_cast<size_t>(std::max<std::streamsize>(file_.gcount(), 0)));
    return bytes;
  }

  void start(Kind kind, int64_t offset, int64_t line) {
    kind_ = kind;
    splitter_ = Splitter(kind, offset, line, delimiter_);
  }

  void start_csv(int64_t begin) {
    Splitter splitter(Kind::kCsv, begin, 1, delimiter_);
    Span first;
    bool found = false;
    std::string bytes;
    // The bytes after the first record are scanned again by the splitter that starts behind it.
    for (int64_t offset = begin; !found && !(bytes = read_bytes(offset, kChunkBytes)).empty(); offset += bytes.size()) {
      splitter.feed(bytes, [&](const Span& span) {
        if (!found) first = span;
        found = true;
      });
      check_record_size(splitter);
    }
    if (!found) {
      splitter.finish([&](const Span& span) {
        first = span;
        found = true;
      });
    }
    MOESAIC_CHECK(found, DataError, "{}: empty; the first line of a CSV file names its columns", path_);
    std::string line = read_bytes(first.begin, first.end - first.begin);
    columns_ = parse_csv(line, delimiter_, fmt::format("{} line {}", path_, first.line));
    for (size_t i = 0; i < columns_.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        MOESAIC_CHECK(columns_[i] != columns_[j], DataError, "{}: two columns are named '{}'", path_, columns_[i]);
      }
    }
    start(Kind::kCsv, first.end, first.line + static_cast<int64_t>(std::count(line.begin(), line.end(), '\n')));
  }

  /// An array, an object with an array "Instances", or JSON Lines under the wrong ending.
  void start_json(int64_t begin) {
    int64_t line = 1;
    char first = 0;
    std::string bytes;
    int64_t offset = begin;
    while (first == 0 && !(bytes = read_bytes(offset, kChunkBytes)).empty()) {
      for (size_t i = 0; i < bytes.size() && first == 0; ++i, ++offset) {
        if (!is_space(bytes[i])) first = bytes[i];
        if (bytes[i] == '\n') ++line;
      }
    }
    if (first == '[') {
      start(Kind::kJsonArray, offset, line);
    } else if (first == '{') {
      if (has_two_objects(offset - 1, line))
        start(Kind::kJsonLines, offset - 1, line);
      else
        start_task(offset, line);
    } else {
      throw FormatError(fmt::format("{}: got {}, expected a JSON array of rows", path_,
                                    first == 0 ? "an empty file" : fmt::format("'{}' at line {}", first, line)));
    }
  }

  bool has_two_objects(int64_t offset, int64_t line) {
    Splitter splitter(Kind::kJsonLines, offset, line);
    std::vector<Span> spans;
    std::string bytes;
    while (spans.size() < 2 && !(bytes = read_bytes(offset, kChunkBytes)).empty()) {
      splitter.feed(bytes, [&](const Span& span) { spans.push_back(span); });
      if (spans.empty() && splitter.open_bytes() > kMaxRecordBytes) return false;
      offset += static_cast<int64_t>(bytes.size());
    }
    splitter.finish([&](const Span& span) { spans.push_back(span); });
    if (spans.size() < 2) return false;
    try {
      parse_ordered_json(read_bytes(spans[0].begin, spans[0].end - spans[0].begin), path_);
      return true;
    } catch (const FormatError&) {
      return false;
    }
  }

  /// Finds "Definition" and the array "Instances" among the members of the object that begins before `offset`.
  void start_task(int64_t offset, int64_t line) {
    // An object's members are split like an array's elements: both end at a comma on the outer level.
    const std::string hint = "expected an array of rows, or a task object with \"Definition\" and \"Instances\"";
    const int64_t size = static_cast<int64_t>(std::filesystem::file_size(plain_ ? plain_->path() : path_));
    MOESAIC_CHECK(size <= int64_t{256} << 20, DataError, "{}: got one JSON object of {} bytes, {}", path_, size, hint);
    std::string text = read_bytes(offset, size);
    size_t close = text.find_last_of('}');
    MOESAIC_CHECK(close != std::string::npos, FormatError, "{}: cut short: the object never ends: {}", path_,
                  ends_early(size));
    text[close] = ']';
    std::optional<Span> instances;
    Splitter splitter(Kind::kJsonArray, 0, line);
    splitter.feed(text, [&](const Span& span) {
      std::string_view member = std::string_view(text).substr(span.begin, span.end - span.begin);
      if (member.starts_with("\"Instances\"")) {
        instances = span;
      } else if (member.starts_with("\"Definition\"")) {
        header_ = parse_ordered_json("{" + std::string(member) + "}", fmt::format("{} line {}", path_, span.line));
      }
    });
    MOESAIC_CHECK(instances && !header_.is_null(), DataError, "{}: got one JSON object, {}", path_, hint);
    size_t begin = text.find('[', instances->begin);
    MOESAIC_CHECK(begin < static_cast<size_t>(instances->end), DataError, "{} line {}: \"Instances\" is not an array",
                  path_, instances->line);
    int64_t breaks = std::count(text.begin() + instances->begin, text.begin() + begin, '\n');
    start(Kind::kJsonArray, offset + static_cast<int64_t>(begin) + 1, instances->line + breaks);
  }

  void check_record_size(const Splitter& splitter) const {
    MOESAIC_CHECK(splitter.open_bytes() <= kMaxRecordBytes, FormatError,
                  "{} line {}: a row of more than {} MiB; is this a file of rows?", path_, splitter.open_line(),
                  kMaxRecordBytes >> 20);
  }

  void scan_chunk() {
    auto on_record = [&](const Span& span) {
      if (blocks_.empty() || rows_ - blocks_.back().first_row >= kBlockRecords ||
          span.end - blocks_.back().begin > kBlockBytes) {
        blocks_.push_back({span.begin, span.line, rows_});
      }
      ++rows_;
    };
    std::string bytes = read_bytes(splitter_.offset(), kChunkBytes);
    splitter_.feed(bytes, on_record);
    check_record_size(splitter_);
    if (bytes.empty()) {
      MOESAIC_CHECK(splitter_.finish(on_record), FormatError, "{} line {}: cut short: the file ends inside {}: {}",
                    path_, splitter_.open_line(), kind_ == Kind::kCsv ? "a quoted field" : "the array of rows",
                    ends_early(std::filesystem::file_size(path_)));
      done_ = true;
    } else if (splitter_.ended()) {
      // A task object has further members behind its array.
      std::string rest = header_.is_null() ? read_bytes(splitter_.offset(), kChunkBytes) : "";
      MOESAIC_CHECK(std::all_of(rest.begin(), rest.end(), is_space), FormatError,
                    "{} line {}: the array of rows ends here, yet the file goes on", path_, splitter_.line());
      done_ = true;
    }
  }

  /// The place of a record; its block is read into memory.
  Span find(int64_t row) {
    // One block further than `row`, so that the end of its block is known.
    while (!done_ && (blocks_.empty() || blocks_.back().first_row <= row)) scan_chunk();
    MOESAIC_CHECK(row < rows_, DataError, "{}: row {} of {}", path_, row, rows_);
    auto next = std::upper_bound(blocks_.begin(), blocks_.end(), row,
                                 [](int64_t value, const Block& block) { return value < block.first_row; });
    const Block& block = *(next - 1);
    if (block.begin != block_begin_) {
      int64_t end = next == blocks_.end() ? splitter_.offset() : next->begin;
      block_bytes_ = read_bytes(block.begin, end - block.begin);
      block_begin_ = block.begin;
      spans_.clear();
      auto on_record = [&](const Span& span) { spans_.push_back(span); };
      Splitter splitter(kind_, block.begin, block.line, delimiter_);
      splitter.feed(block_bytes_, on_record);
      if (kind_ != Kind::kJsonArray) splitter.finish(on_record);
    }
    size_t index = static_cast<size_t>(row - block.first_row);
    MOESAIC_CHECK(index < spans_.size(), DataError, "{}: changed while it was read", path_);
    return spans_[index];
  }

  std::string path_;
  std::shared_ptr<const TemporaryFile> plain_;  // of a compressed file
  std::ifstream file_;
  Kind kind_ = Kind::kJsonLines;
  char delimiter_;                    // CSV
  std::vector<std::string> columns_;  // CSV
  OrderedJson header_;
  Splitter splitter_;  // how far the file has been scanned
  std::vector<Block> blocks_;
  int64_t rows_ = 0;
  bool done_ = false;
  int64_t block_begin_ = -1;  // the block in memory
  std::string block_bytes_;
  std::vector<Span> spans_;
};

}  // namespace

std::unique_ptr<RecordFile> open_text_file(const std::filesystem::path& path, const std::string& extension) {
  return std::make_unique<TextFile>(path, extension);
}

}  // namespace moesaic::data
