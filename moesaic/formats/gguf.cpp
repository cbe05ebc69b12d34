#include "moesaic/formats/gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/formats/utf8.h"

namespace moesaic::formats {
namespace {

constexpr uint64_t kMaxKeyBytes = 65'535, kMaxNameBytes = 255, kMaxAlignment = 1 << 20;
constexpr uint32_t kMaxDims = 4;
constexpr int kMaxArrayDepth = 4;
constexpr size_t kMaxListedErrors = 10;

enum ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

/// Bytes of a value of fixed size; 0 for strings, arrays and unknown types.
size_t value_bytes(uint32_t type) {
  switch (type) {
    case kUint8:
    case kInt8:
    case kBool: return 1;
    case kUint16:
    case kInt16: return 2;
    case kUint32:
    case kInt32:
    case kFloat32: return 4;
    case kUint64:
    case kInt64:
    case kFloat64: return 8;
    default: return 0;
  }
}

template <class T>
T load(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

/// A number of the given type as the variant's widest kind.
GgufValue load_value(uint32_t type, const uint8_t* data) {
  switch (type) {
    case kUint8: return uint64_t{load<uint8_t>(data)};
    case kInt8: return int64_t{load<int8_t>(data)};
    case kUint16: return uint64_t{load<uint16_t>(data)};
    case kInt16: return int64_t{load<int16_t>(data)};
    case kUint32: return uint64_t{load<uint32_t>(data)};
    case kInt32: return int64_t{load<int32_t>(data)};
    case kUint64: return load<uint64_t>(data);
    case kInt64: return load<int64_t>(data);
    case kFloat32: return double{load<float>(data)};
    case kFloat64: return load<double>(data);
    default: return load<uint8_t>(data) != 0;
  }
}

/// A cursor over the file that never passes its end.
class Reader {
 public:
  explicit Reader(const Bytes& bytes) : bytes_(bytes) {}

  size_t offset() const { return offset_; }
  size_t left() const { return bytes_.size - offset_; }

  const uint8_t* take(uint64_t size, const char* what) {
    MOESAIC_CHECK(size <= left(), FormatError, "{}: {} at byte {} needs {} bytes, but only {} are left: {}",
                  bytes_.where, what, offset_, size, left(), ends_early(bytes_.size));
    const uint8_t* data = bytes_.data + offset_;
    offset_ += size;
    return data;
  }

  template <class T>
  T number(const char* what) {
    return load<T>(take(sizeof(T), what));
  }

  std::string_view string(const char* what, uint64_t max_bytes) {
    const auto size = number<uint64_t>(what);
    MOESAIC_CHECK(size <= max_bytes, FormatError, "{}: {} at byte {} says it has {} bytes, expected at most {}",
                  bytes_.where, what, offset_, size, max_bytes);
    return {reinterpret_cast<const char*>(take(size, what)), size};
  }

  /// A count of things of at least `min_bytes` each, so that a lying one is caught before anything is reserved.
  uint64_t count(const char* what, uint64_t min_bytes) {
    const auto value = number<uint64_t>(what);
    return check_count(value, what, min_bytes);
  }
  uint64_t check_count(uint64_t value, const char* what, uint64_t min_bytes) const {
    MOESAIC_CHECK(value <= left() / min_bytes, FormatError,
                  "{}: says it has {} {}, but the {} bytes left hold at most {}: that is a lie, or {}", bytes_.where,
                  value, what, left(), left() / min_bytes, ends_early(bytes_.size));
    return value;
  }

  GgufArray array(const std::string& key, int depth) {
    MOESAIC_CHECK(depth <= kMaxArrayDepth, FormatError, "{}: '{}': arrays nested deeper than {}", bytes_.where, key,
                  kMaxArrayDepth);
    GgufArray array;
    array.type = number<uint32_t>("an array's type");
    if (const size_t size = value_bytes(array.type); size > 0) {
      array.count = count("array elements", size);
      array.data = take(array.count * size, "an array");
    } else if (array.type == kString) {
      array.count = count("array strings", 8);
      for (uint64_t i = 0; i < array.count; ++i) array.strings.push_back(string("a string of an array", UINT64_MAX));
    } else if (array.type == kArray) {
      array.count = count("nested arrays", 12);
      for (uint64_t i = 0; i < array.count; ++i) this->array(key, depth + 1);
    } else {
      throw FormatError(fmt::format("{}: '{}': unknown array type {}", bytes_.where, key, array.type));
    }
    return array;
  }

  GgufValue value(const std::string& key) {
    const auto type = number<uint32_t>("a value's type");
    if (const size_t size = value_bytes(type); size > 0) return load_value(type, take(size, "a value"));
    if (type == kString) return string("a value's string", UINT64_MAX);
    if (type == kArray) return array(key, 1);
    throw FormatError(fmt::format("{}: '{}': unknown value type {}", bytes_.where, key, type));
  }

 private:
  const Bytes& bytes_;
  size_t offset_ = 0;
};

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::kF32, "F32", 1, 4},       {GgmlType::kF16, "F16", 1, 2},         {GgmlType::kBF16, "BF16", 1, 2},
    {GgmlType::kQ4_0, "Q4_0", 32, 18},   {GgmlType::kQ4_1, "Q4_1", 32, 20},     {GgmlType::kQ5_0, "Q5_0", 32, 22},
    {GgmlType::kQ5_1, "Q5_1", 32, 24},   {GgmlType::kQ8_0, "Q8_0", 32, 34},     {GgmlType::kQ2_K, "Q2_K", 256, 84},
    {GgmlType::kQ3_K, "Q3_K", 256, 110}, {GgmlType::kQ4_K, "Q4_K", 256, 144},   {GgmlType::kQ5_K, "Q5_K", 256, 176},
    {GgmlType::kQ6_K, "Q6_K", 256, 210}, {GgmlType::kIQ4_NL, "IQ4_NL", 32, 18}, {GgmlType::kIQ4_XS, "IQ4_XS", 256, 136},
};

/// Types of ggml's that are known by name only.
constexpr std::pair<uint32_t, const char*> kUnreadTypes[] = {
    {9, "Q8_1"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {21, "IQ3_S"},
    {22, "IQ2_S"}, {24, "I8"},    {25, "I16"},     {26, "I32"},    {27, "I64"},     {28, "F64"},   {29, "IQ1_M"},
    {34, "TQ1_0"}, {35, "TQ2_0"}, {39, "MXFP4"},   {40, "NVFP4"},  {41, "Q1_0"},
};

/// "type 16 (IQ2_XXS)"
std::string type_text(uint32_t type) {
  for (const auto& [number, name] : kUnreadTypes) {
    if (number == type) return fmt::format("type {} ({})", type, name);
  }
  return fmt::format("type {}", type);
}

const GgmlTypeInfo* find_type(uint32_t type) {
  for (const auto& info : kTypes) {
    if (static_cast<uint32_t>(info.type) == type) return &info;
  }
  return nullptr;
}

/// A tensor's row before its data is located.
struct TensorRow {
  std::string name;
  uint32_t type;
  std::vector<uint64_t> dims;  // ggml's order: contiguous first
  uint64_t offset;
};

/// Locates a row's data. Returns an error text, empty when it is fine.
/// `beyond`: bytes that the file lacks of it.
std::string locate(const TensorRow& row, std::string_view data, uint64_t alignment, GgufTensor& tensor,
                   uint64_t& beyond) {
  const GgmlTypeInfo* info = find_type(row.type);
  if (info == nullptr) {
    std::vector<const char*> known;
    for (const auto& type : kTypes) known.push_back(type.name);
    return fmt::format("has the unknown or unsupported {}; supported: {}", type_text(row.type), fmt::join(known, " "));
  }
  uint64_t elements = 1;
  for (const uint64_t dim : row.dims) {
    if (dim == 0 || dim > uint64_t{INT64_MAX} || __builtin_mul_overflow(elements, dim, &elements)) {
      return fmt::format("has an impossible shape [{}]", fmt::join(row.dims, ", "));
    }
  }
  if (row.dims[0] % info->elements != 0) {
    return fmt::format("has rows of {} elements, but {} packs {} at a time", row.dims[0], info->name, info->elements);
  }
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(elements / info->elements, static_cast<uint64_t>(info->bytes), &bytes)) {
    return fmt::format("has a shape whose bytes overflow: [{}]", fmt::join(row.dims, ", "));
  }
  if (row.offset % alignment != 0) return fmt::format("has the offset {}, not a multiple of {}", row.offset, alignment);
  if (row.offset > data.size() || bytes > data.size() - row.offset) {
    if (!__builtin_add_overflow(row.offset, bytes, &beyond)) beyond -= data.size();
    return fmt::format("needs data bytes {} to {} + {}, but the file has {}: it is truncated or its offsets lie",
                       row.offset, row.offset, bytes, data.size());
  }
  tensor = {row.name, info->type, {row.dims.rbegin(), row.dims.rend()}, data.substr(row.offset, bytes)};
  return "";
}

}  // namespace

const GgmlTypeInfo& ggml_type_info(GgmlType type) {
  const GgmlTypeInfo* info = find_type(static_cast<uint32_t>(type));
  MOESAIC_CHECK(info != nullptr, FormatError, "unknown GGUF tensor type {}", static_cast<uint32_t>(type));
  return *info;
}

GgufFile::GgufFile(Bytes bytes) : bytes_(std::move(bytes)) {
  const std::string& where = bytes_.where;
  Reader reader(bytes_);
  MOESAIC_CHECK(bytes_.size >= 24 && bytes_.text(0, 4) == "GGUF", FormatError,
                "{}: is not a GGUF file: it does not begin with 'GGUF'", where);
  reader.take(4, "the magic");
  const auto version = reader.number<uint32_t>("the version");
  MOESAIC_CHECK(version == 2 || version == 3, FormatError, "{}: got GGUF version {}, expected 2 or 3{}", where, version,
                (version & 0xffff) == 0 ? " (it looks big-endian: convert it with gguf-convert-endian)" : "");
  const auto tensor_count = reader.number<uint64_t>("the tensor count");
  const auto value_count = reader.number<uint64_t>("the metadata count");
  reader.check_count(tensor_count, "tensors", 8 + 1 + 4 + 8 + 4 + 8);
  reader.check_count(value_count, "metadata values", 8 + 1 + 4 + 1);

  for (uint64_t i = 0; i < value_count; ++i) {
    std::string key(reader.string("a metadata key", kMaxKeyBytes));
    MOESAIC_CHECK(is_utf8(key), FormatError, "{}: metadata key {} is not valid UTF-8", where, i);
    GgufValue value = reader.value(key);
    MOESAIC_CHECK(metadata_.emplace(key, std::move(value)).second, FormatError, "{}: metadata key '{}' stands twice",
                  where, key);
  }
  const uint64_t alignment = find_uint("general.alignment").value_or(32);
  MOESAIC_CHECK(alignment > 0 && alignment <= kMaxAlignment && (alignment & (alignment - 1)) == 0, FormatError,
                "{}: general.alignment: got {}, expected a power of two up to {}", where, alignment, kMaxAlignment);
  MOESAIC_CHECK(find_uint("split.count").value_or(1) <= 1, FormatError,
                "{}: is one part of a split GGUF; join the parts with 'llama-gguf-split --merge' first", where);

  std::vector<TensorRow> rows;
  std::set<std::string> names;
  for (uint64_t i = 0; i < tensor_count; ++i) {
    TensorRow row;
    row.name = reader.string("a tensor's name", kMaxNameBytes);
    MOESAIC_CHECK(is_utf8(row.name), FormatError, "{}: the name of tensor {} is not valid UTF-8", where, i);
    MOESAIC_CHECK(names.insert(row.name).second, FormatError, "{}: tensor '{}' stands twice", where, row.name);
    const auto dims = reader.number<uint32_t>("a tensor's dimensions");
    MOESAIC_CHECK(dims >= 1 && dims <= kMaxDims, FormatError, "{}: tensor '{}': got {} dimensions, expected 1 to {}",
                  where, row.name, dims, kMaxDims);
    for (uint32_t d = 0; d < dims; ++d) row.dims.push_back(reader.number<uint64_t>("a tensor's shape"));
    row.type = reader.number<uint32_t>("a tensor's type");
    row.offset = reader.number<uint64_t>("a tensor's offset");
    rows.push_back(std::move(row));
  }

  const size_t data_begin = std::min((reader.offset() + alignment - 1) / alignment * alignment, bytes_.size);
  const std::string_view data = bytes_.text(data_begin, bytes_.size - data_begin);
  std::vector<std::string> errors;
  uint64_t missing = 0;
  for (const auto& row : rows) {
    GgufTensor tensor;
    uint64_t beyond = 0;
    const std::string error = locate(row, data, alignment, tensor, beyond);
    if (error.empty()) {
      tensors_.push_back(std::move(tensor));
      continue;
    }
    const bool said = beyond > 0 && missing > 0;  // of a file that ends early, one tensor is enough
    missing = std::max(missing, beyond);
    if (!said && errors.size() < kMaxListedErrors) errors.push_back(fmt::format("tensor '{}' {}", row.name, error));
  }
  MOESAIC_CHECK(errors.empty(), FormatError, "{}:\n  {}{}", where, fmt::join(errors, "\n  "),
                missing > 0 ? "\n" + ends_early(bytes_.size, missing) : "");

  std::vector<const GgufTensor*> by_offset;
  for (const auto& tensor : tensors_) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(),
            [](const auto* a, const auto* b) { return a->bytes.data() < b->bytes.data(); });
  for (size_t i = 1; i < by_offset.size(); ++i) {
    const GgufTensor &before = *by_offset[i - 1], &after = *by_offset[i];
    MOESAIC_CHECK(before.bytes.data() + before.bytes.size() <= after.bytes.data(), FormatError,
                  "{}: tensors '{}' and '{}' overlap", where, before.name, after.name);
  }
}

const GgufValue* GgufFile::find(const std::string& key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? nullptr : &it->second;
}

std::optional<uint64_t> GgufFile::find_uint(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* number = std::get_if<uint64_t>(value)) return *number;
  if (const auto* number = std::get_if<int64_t>(value); number != nullptr && *number >= 0) return *number;
  throw FormatError(fmt::format("{}: metadata '{}' is not a natural number", bytes_.where, key));
}

std::optional<double> GgufFile::find_number(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* number = std::get_if<uint64_t>(value)) return static_cast<double>(*number);
  if (const auto* number = std::get_if<int64_t>(value)) return static_cast<double>(*number);
  if (const auto* number = std::get_if<double>(value); number != nullptr && std::isfinite(*number)) return *number;
  throw FormatError(fmt::format("{}: metadata '{}' is not a finite number", bytes_.where, key));
}

std::optional<bool> GgufFile::find_bool(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (const auto* truth = std::get_if<bool>(value)) return *truth;
  throw FormatError(fmt::format("{}: metadata '{}' is not a truth value", bytes_.where, key));
}

std::optional<std::string> GgufFile::find_string(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto* text = std::get_if<std::string_view>(value);
  MOESAIC_CHECK(text != nullptr && is_utf8(*text), FormatError, "{}: metadata '{}' is not a UTF-8 string", bytes_.where,
                key);
  return std::string(*text);
}

std::vector<std::string_view> GgufFile::strings(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  const auto* array = std::get_if<GgufArray>(value);
  MOESAIC_CHECK(array != nullptr && array->type == kString, FormatError, "{}: metadata '{}' is not an array of strings",
                bytes_.where, key);
  for (size_t i = 0; i < array->strings.size(); ++i) {
    MOESAIC_CHECK(is_utf8(array->strings[i]), FormatError, "{}: metadata '{}': string {} is not valid UTF-8",
                  bytes_.where, key, i);
  }
  return array->strings;
}

std::vector<double> GgufFile::numbers(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  const auto* array = std::get_if<GgufArray>(value);
  MOESAIC_CHECK(array != nullptr && value_bytes(array->type) > 0, FormatError,
                "{}: metadata '{}' is not an array of numbers", bytes_.where, key);
  std::vector<double> numbers;
  for (uint64_t i = 0; i < array->count; ++i) {
    const GgufValue element = load_value(array->type, array->data + i * value_bytes(array->type));
    numbers.push_back(std::visit(
        [](const auto& number) -> double {
          if constexpr (std::is_arithmetic_v<std::decay_t<decltype(number)>>) return static_cast<double>(number);
          return 0;
        },
        element));
  }
  return numbers;
}

}  // namespace moesaic::formats
