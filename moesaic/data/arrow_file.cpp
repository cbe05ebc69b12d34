// .parquet and .arrow: rows of Arrow tables as JSON.
#include <arrow/api.h>
#include <arrow/io/file.h>
#include <arrow/ipc/reader.h>
#include <arrow/util/utf8.h>
#include <parquet/arrow/reader.h>
#include <parquet/file_reader.h>

#include <algorithm>

#include "moesaic/base/file_errors.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {
namespace {

constexpr int64_t kWholeFileBytes = int64_t{64} << 20;  // files up to this size are one block, shuffled as a whole
constexpr int64_t kBlockBytes = int64_t{16} << 20;
constexpr int kMaxDepth = 64;

/// Stands for a value that can't be text; whoever reads its column says so.
OrderedJson unreadable(const arrow::Array& array, const char* why = "") {
  const std::string type = "of the type " + array.type()->ToString() + why;
  return OrderedJson::binary({type.begin(), type.end()});
}

OrderedJson text_or_unreadable(const arrow::Array& array, std::string text) {
  return arrow::util::ValidateUTF8(text) ? OrderedJson(std::move(text)) : unreadable(array, ", but not UTF-8");
}

/// Value `row` of `array`. Numbers, texts, lists and structs become JSON's; dates, times and decimals their text.
/// Throws DataError.
OrderedJson to_json(const arrow::Array& array, int64_t row, const std::string& where, int depth = 0) {
  MOESAIC_CHECK(depth < kMaxDepth, DataError, "{}: nested deeper than {} levels", where, kMaxDepth);
  if (array.IsNull(row)) return nullptr;
  auto list = [&](const arrow::Array& values, int64_t begin, int64_t end) {
    OrderedJson json = OrderedJson::array();
    for (int64_t i = begin; i < end; ++i) json.push_back(to_json(values, i, where, depth + 1));
    return json;
  };
  auto elements = [&](const auto& typed) {
    return list(*typed.values(), typed.value_offset(row), typed.value_offset(row) + typed.value_length(row));
  };
  switch (array.type_id()) {
    case arrow::Type::BOOL: return static_cast<const arrow::BooleanArray&>(array).Value(row);
    case arrow::Type::INT8: return static_cast<const arrow::Int8Array&>(array).Value(row);
    case arrow::Type::INT16: return static_cast<const arrow::Int16Array&>(array).Value(row);
    case arrow::Type::INT32: return static_cast<const arrow::Int32Array&>(array).Value(row);
    case arrow::Type::INT64: return static_cast<const arrow::Int64Array&>(array).Value(row);
    case arrow::Type::UINT8: return static_cast<const arrow::UInt8Array&>(array).Value(row);
    case arrow::Type::UINT16: return static_cast<const arrow::UInt16Array&>(array).Value(row);
    case arrow::Type::UINT32: return static_cast<const arrow::UInt32Array&>(array).Value(row);
    case arrow::Type::UINT64: return static_cast<const arrow::UInt64Array&>(array).Value(row);
    case arrow::Type::FLOAT: return static_cast<const arrow::FloatArray&>(array).Value(row);
    case arrow::Type::DOUBLE: return static_cast<const arrow::DoubleArray&>(array).Value(row);
    case arrow::Type::STRING:
      return text_or_unreadable(array, static_cast<const arrow::StringArray&>(array).GetString(row));
    case arrow::Type::LARGE_STRING:
      return text_or_unreadable(array, static_cast<const arrow::LargeStringArray&>(array).GetString(row));
    case arrow::Type::LIST: return elements(static_cast<const arrow::ListArray&>(array));
    case arrow::Type::LARGE_LIST: return elements(static_cast<const arrow::LargeListArray&>(array));
    case arrow::Type::FIXED_SIZE_LIST: return elements(static_cast<const arrow::FixedSizeListArray&>(array));
    case arrow::Type::STRUCT: {
      const auto& typed = static_cast<const arrow::StructArray&>(array);
      OrderedJson json = OrderedJson::object();
      for (int i = 0; i < typed.num_fields(); ++i) {
        // A struct column holds every key that any of its rows has; null stands for a key this row lacks.
        OrderedJson value = to_json(*typed.field(i), row, where, depth + 1);
        if (!value.is_null()) json[typed.struct_type()->field(i)->name()] = std::move(value);
      }
      return json;
    }
    case arrow::Type::DICTIONARY: {
      const auto& typed = static_cast<const arrow::DictionaryArray&>(array);
      return to_json(*typed.dictionary(), typed.GetValueIndex(row), where, depth + 1);
    }
    case arrow::Type::BINARY:
    case arrow::Type::LARGE_BINARY:
    case arrow::Type::FIXED_SIZE_BINARY:
    case arrow::Type::MAP: return unreadable(array);
    default: {
      auto scalar = array.GetScalar(row);
      return scalar.ok() ? text_or_unreadable(array, (*scalar)->ToString()) : unreadable(array);
    }
  }
}

/// `data` with its texts as bytes.
std::shared_ptr<arrow::ArrayData> as_bytes(const arrow::ArrayData& data) {
  const auto bytes = data.Copy();
  for (auto& child : bytes->child_data) child = as_bytes(*child);
  auto inner = [&] { return data.type->field(0)->WithType(bytes->child_data[0]->type); };
  switch (data.type->id()) {
    case arrow::Type::STRING: bytes->type = arrow::binary(); break;
    case arrow::Type::LARGE_STRING: bytes->type = arrow::large_binary(); break;
    case arrow::Type::STRING_VIEW: bytes->type = arrow::binary_view(); break;
    case arrow::Type::LIST: bytes->type = arrow::list(inner()); break;
    case arrow::Type::LARGE_LIST: bytes->type = arrow::large_list(inner()); break;
    case arrow::Type::FIXED_SIZE_LIST:
      bytes->type =
          arrow::fixed_size_list(inner(), static_cast<const arrow::FixedSizeListType&>(*data.type).list_size());
      break;
    case arrow::Type::MAP: bytes->type = std::make_shared<arrow::MapType>(inner()); break;
    case arrow::Type::STRUCT: {
      arrow::FieldVector fields;
      for (size_t i = 0; i < bytes->child_data.size(); ++i) {
        fields.push_back(data.type->field(static_cast<int>(i))->WithType(bytes->child_data[i]->type));
      }
      bytes->type = arrow::struct_(fields);
      break;
    }
    case arrow::Type::DICTIONARY: {
      const auto& type = static_cast<const arrow::DictionaryType&>(*data.type);
      bytes->dictionary = as_bytes(*data.dictionary);
      bytes->type = arrow::dictionary(type.index_type(), bytes->dictionary->type, type.ordered());
      break;
    }
    default: return data.Copy();
  }
  return bytes;
}

/// Whether every offset and count is sound. What texts hold is judged where they are read.
arrow::Status validate(const arrow::Array& array) { return arrow::MakeArray(as_bytes(*array.data()))->ValidateFull(); }

/// Names of columns and of the fields inside them are UTF-8.
bool names_are_text(const arrow::FieldVector& fields, int depth = 0) {
  return depth < kMaxDepth && std::all_of(
                                  fields.begin(), fields.end(),
                                  [&](const auto& field) {
                                    return arrow::util::ValidateUTF8(field->name()) &&
                                           names_are_text(field->type()->fields(), depth + 1);
                                  });
}

/// Whether a file begins as Parquet's and Arrow's do and doesn't end so: both repeat their mark at the end.
bool is_cut(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  for (const std::string_view mark : {"PAR1", "ARROW1"}) {
    std::string begin(mark.size(), '\0'), end = begin;
    file.clear();
    file.seekg(0).read(begin.data(), std::ssize(begin));
    file.seekg(-std::ssize(end), std::ios::end).read(end.data(), std::ssize(end));
    if (begin == mark) return end != mark;
  }
  return false;
}

/// Turns Arrow's errors and exceptions into a FormatError with the file's name.
template <class Function>
auto guarded(const std::string& path, Function&& function) {
  auto refuse = [&](const std::string& reason) {
    throw FormatError(
        fmt::format("{}: {}", path, is_cut(path) ? ends_early(std::filesystem::file_size(path)) : reason));
  };
  try {
    auto result = function();
    if (!result.ok()) refuse(result.status().message());
    return std::move(result).ValueUnsafe();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    refuse(error.what());
    throw;
  }
}

/// A file of tables. Two at a time are in memory: the templates of a data set read it at about the same place, which is
/// now and then on both sides of a border.
class ArrowFile : public RecordFile {
 public:
  explicit ArrowFile(const std::filesystem::path& path) : path_(path.string()) { arrow::util::InitializeUTF8(); }

  bool has(int64_t row) override { return row < starts_.back(); }
  int64_t rows() override { return starts_.back(); }
  std::string where(int64_t row) override { return fmt::format("{} row {}", path_, row + 1); }
  std::vector<int64_t> blocks() override { return starts_; }

  OrderedJson read(int64_t row) override {
    auto block = std::upper_bound(starts_.begin(), starts_.end(), row) - starts_.begin() - 1;
    if (block != loaded_.block) std::swap(loaded_, before_);
    std::shared_ptr<arrow::Table>& table = loaded_.table;
    if (block != loaded_.block) {
      loaded_.block = -1;
      table = guarded(path_, [&]() -> arrow::Result<std::shared_ptr<arrow::Table>> {
        ARROW_ASSIGN_OR_RAISE(auto read, load_table(block));
        return read->CombineChunks();
      });
      MOESAIC_CHECK(table->num_rows() == starts_[block + 1] - starts_[block], FormatError,
                    "{}: got {} rows from row {}, the file's frame says {}", path_, table->num_rows(), starts_[block],
                    starts_[block + 1] - starts_[block]);
      arrow::Status status = table->Validate();
      for (const auto& column : table->columns()) {
        for (const auto& chunk : column->chunks()) status = status.ok() ? validate(*chunk) : status;
      }
      MOESAIC_CHECK(status.ok(), FormatError, "{}: {}", path_, status.message());
      MOESAIC_CHECK(names_are_text(table->schema()->fields()), FormatError,
                    "{}: a column's name is not UTF-8, or its type is nested too deep", path_);
      loaded_.block = block;
    }
    OrderedJson record = OrderedJson::object();
    for (int i = 0; i < table->num_columns(); ++i) {
      const auto& column = *table->column(i);
      if (column.num_chunks() == 0) continue;
      record[table->schema()->field(i)->name()] = to_json(*column.chunk(0), row - starts_[block], where(row));
    }
    return record;
  }

 protected:
  virtual arrow::Result<std::shared_ptr<arrow::Table>> load_table(int64_t block) = 0;

  std::string path_;
  std::vector<int64_t> starts_{0};

 private:
  struct Loaded {
    int64_t block = -1;
    std::shared_ptr<arrow::Table> table;
  };
  Loaded loaded_, before_;
};

/// Blocks are stretches of about 16 MiB of a row group, so memory does not grow with the size of row groups.
class ParquetFile : public ArrowFile {
 public:
  explicit ParquetFile(const std::filesystem::path& path) : ArrowFile(path) {
    reader_ = guarded(path_, [&]() -> arrow::Result<std::unique_ptr<parquet::arrow::FileReader>> {
      ARROW_ASSIGN_OR_RAISE(auto file, arrow::io::ReadableFile::Open(path_));
      return parquet::arrow::OpenFile(file, arrow::default_memory_pool());
    });
    auto metadata = reader_->parquet_reader()->metadata();
    int64_t bytes = 0, rows = 0;
    for (int group = 0; group < metadata->num_row_groups(); ++group) {
      auto row_group = metadata->RowGroup(group);
      int64_t group_rows = row_group->num_rows(), group_bytes = row_group->total_byte_size();
      MOESAIC_CHECK(group_rows >= 0 && group_bytes >= 0, FormatError, "{}: row group {} has {} rows in {} bytes", path_,
                    group, group_rows, group_bytes);
      int64_t step = std::max<int64_t>(1, group_rows / (group_bytes / kBlockBytes + 1));
      for (int64_t first = 0; first < group_rows; first += step) {
        pieces_.push_back({group, first, std::min(step, group_rows - first)});
      }
      bytes += group_bytes;
      rows += group_rows;
    }
    whole_ = bytes <= kWholeFileBytes;
    if (whole_) {
      if (rows > 0) starts_.push_back(rows);
    } else {
      for (const Piece& piece : pieces_) starts_.push_back(starts_.back() + piece.rows);
    }
  }

 private:
  struct Piece {
    int group;
    int64_t first, rows;
  };

  arrow::Result<std::shared_ptr<arrow::Table>> load_table(int64_t block) override {
    if (whole_) {
      std::shared_ptr<arrow::Table> table;
      ARROW_RETURN_NOT_OK(reader_->ReadTable(&table));
      return table;
    }
    const Piece& piece = pieces_[static_cast<size_t>(block)];
    if (!batches_ || piece.group != group_ || piece.first < next_row_) {
      reader_->set_batch_size(piece.rows);
      ARROW_ASSIGN_OR_RAISE(batches_, reader_->GetRecordBatchReader(std::vector<int>{piece.group}));
      group_ = piece.group;
      next_row_ = 0;
      pending_.reset();
    }
    std::vector<std::shared_ptr<arrow::RecordBatch>> parts;
    int64_t wanted = piece.rows;
    while (wanted > 0) {
      if (!pending_ || pending_->num_rows() == 0) {
        ARROW_RETURN_NOT_OK(batches_->ReadNext(&pending_));
        if (!pending_) return arrow::Status::Invalid("row group ", piece.group, " ends early");
      }
      int64_t skip = std::min(piece.first - next_row_, pending_->num_rows());
      if (skip > 0) {
        pending_ = pending_->Slice(skip);
        next_row_ += skip;
        continue;
      }
      int64_t take = std::min(wanted, pending_->num_rows());
      parts.push_back(pending_->Slice(0, take));
      pending_ = pending_->Slice(take);
      next_row_ += take;
      wanted -= take;
    }
    return arrow::Table::FromRecordBatches(parts);
  }

  std::unique_ptr<parquet::arrow::FileReader> reader_;
  std::vector<Piece> pieces_;
  bool whole_ = false;
  std::unique_ptr<arrow::RecordBatchReader> batches_;  // of group_, standing at next_row_
  std::shared_ptr<arrow::RecordBatch> pending_;
  int group_ = -1;
  int64_t next_row_ = 0;
};

/// The file and the stream format of Arrow IPC; the file is mapped, so batches are read in place.
class IpcFile : public ArrowFile {
 public:
  explicit IpcFile(const std::filesystem::path& path) : ArrowFile(path) {
    file_ = guarded(path_, [&] { return arrow::io::MemoryMappedFile::Open(path_, arrow::io::FileMode::READ); });
    int64_t bytes = guarded(path_, [&] { return file_->GetSize(); });
    std::string magic = guarded(path_, [&] { return file_->ReadAt(0, std::min<int64_t>(bytes, 6)); })->ToString();
    if (magic == "ARROW1") {
      reader_ = guarded(path_, [&] { return arrow::ipc::RecordBatchFileReader::Open(file_); });
    }
    std::vector<int64_t> starts{0};
    for (int64_t batch = 0; auto loaded = guarded(path_, [&] { return read_batch(batch); }); ++batch) {
      starts.push_back(starts.back() + loaded->num_rows());
    }
    batches_ = static_cast<int64_t>(starts.size()) - 1;
    whole_ = bytes <= kWholeFileBytes;
    if (!whole_)
      starts_ = starts;
    else if (starts.back() > 0)
      starts_.push_back(starts.back());
  }

 private:
  /// Batch `index`, or null behind the last.
  arrow::Result<std::shared_ptr<arrow::RecordBatch>> read_batch(int64_t index) {
    if (reader_) {
      if (index >= reader_->num_record_batches()) return nullptr;
      return reader_->ReadRecordBatch(static_cast<int>(index));
    }
    if (!stream_ || index < next_batch_) {
      ARROW_RETURN_NOT_OK(file_->Seek(0));
      ARROW_ASSIGN_OR_RAISE(stream_, arrow::ipc::RecordBatchStreamReader::Open(file_));
      next_batch_ = 0;
    }
    std::shared_ptr<arrow::RecordBatch> batch;
    while (next_batch_ <= index) {
      ARROW_RETURN_NOT_OK(stream_->ReadNext(&batch));
      ++next_batch_;
      if (!batch) break;
    }
    return batch;
  }

  arrow::Result<std::shared_ptr<arrow::Table>> load_table(int64_t block) override {
    std::vector<std::shared_ptr<arrow::RecordBatch>> batches;
    for (int64_t i = whole_ ? 0 : block; i < (whole_ ? batches_ : block + 1); ++i) {
      ARROW_ASSIGN_OR_RAISE(auto batch, read_batch(i));
      if (!batch) return arrow::Status::Invalid("batch ", i, " is missing");
      ARROW_RETURN_NOT_OK(batch->Validate());
      for (const auto& column : batch->columns()) ARROW_RETURN_NOT_OK(validate(*column));  // the reader trusts offsets
      batches.push_back(std::move(batch));
    }
    return arrow::Table::FromRecordBatches(batches);
  }

  std::shared_ptr<arrow::io::MemoryMappedFile> file_;
  std::shared_ptr<arrow::ipc::RecordBatchFileReader> reader_;    // file format
  std::shared_ptr<arrow::ipc::RecordBatchStreamReader> stream_;  // stream format
  int64_t next_batch_ = 0, batches_ = 0;
  bool whole_ = false;
};

}  // namespace

std::unique_ptr<RecordFile> open_arrow_file(const std::filesystem::path& path, const std::string& extension) {
  if (extension == ".parquet") return std::make_unique<ParquetFile>(path);
  return std::make_unique<IpcFile>(path);
}

}  // namespace moesaic::data
