#include "moesaic/formats/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "moesaic/base/file_errors.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/safetensors_layout.h"

namespace moesaic::formats {
namespace {

constexpr size_t kMaxDims = 16;
constexpr size_t kMaxListedErrors = 10;

uint64_t read_u64_le(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

/// Where one tensor lies; `begin` and `end` count from the end of the header.
struct Entry {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  size_t begin = 0, end = 0;
  size_t beyond = 0;  // bytes that the file lacks
};

/// Parses one header entry. Returns an error text, empty when it is fine.
std::string parse_entry(const Json& json, size_t data_size, Entry& entry) {
  if (!json.is_object()) return "is not an object";
  const auto dtype = json.find("dtype"), shape = json.find("shape"), offsets = json.find("data_offsets");
  if (dtype == json.end() || !dtype->is_string()) return "has no dtype";
  const StoredDtype* known = find_stored_dtype(dtype->get<std::string>());
  if (known == nullptr) {
    return fmt::format("has the unknown dtype '{}'; known: F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL",
                       dtype->get<std::string>().substr(0, 40));
  }
  if (shape == json.end() || !shape->is_array() || shape->size() > kMaxDims) {
    return fmt::format("has no shape of at most {} sizes", kMaxDims);
  }
  entry.dtype = known->dtype;
  size_t bytes = c10::elementSize(known->dtype);
  for (const auto& size : *shape) {
    if (!size.is_number_unsigned())
      return fmt::format("has a size that is not a natural number: {}", size.dump().substr(0, 40));
    const auto value = size.get<uint64_t>();
    if (value > uint64_t{INT64_MAX} || __builtin_mul_overflow(bytes, value, &bytes)) {
      return fmt::format("has a shape whose bytes overflow: {}", shape->dump().substr(0, 80));
    }
    entry.shape.push_back(static_cast<int64_t>(value));
  }
  const bool two = offsets != json.end() && offsets->is_array() && offsets->size() == 2 &&
                   (*offsets)[0].is_number_unsigned() && (*offsets)[1].is_number_unsigned();
  if (!two) return "has no data_offsets [begin, end]";
  const auto begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data_size) {
    if (begin <= end && end - begin == bytes) entry.beyond = end - data_size;
    return fmt::format("has data_offsets [{}, {}] outside of the file's {} data bytes", begin, end, data_size);
  }
  if (end - begin != bytes) {
    return fmt::format("has {} bytes (data_offsets [{}, {}]), but {} {} needs {}", end - begin, begin, end, known->name,
                       shape->dump(), bytes);
  }
  entry.begin = begin;
  entry.end = end;
  return "";
}

}  // namespace

struct SafetensorsFile::Impl {
  Bytes bytes;
  const uint8_t* data = nullptr;
  std::vector<std::string> names;  // sorted
  std::unordered_map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;

  const Entry& at(const std::string& name) const {
    const auto it = entries.find(name);
    MOESAIC_CHECK(it != entries.end(), DataError, "{}: has no tensor '{}'", bytes.where, name);
    return it->second;
  }
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : SafetensorsFile(Bytes::map(path)) {}

SafetensorsFile::SafetensorsFile(Bytes bytes) {
  auto impl = std::make_shared<Impl>();
  const std::string& where = bytes.where;
  MOESAIC_CHECK(bytes.size >= 10, FormatError, "{}: got {} bytes, too short for a safetensors file: {}", where,
                bytes.size, ends_early(bytes.size));
  const uint64_t header_size = read_u64_le(bytes.data);
  MOESAIC_CHECK(bytes.text(0, 7) != "version", FormatError,
                "{}: is a Git LFS pointer, not the file itself. Fetch it with 'git lfs pull'.", where);
  MOESAIC_CHECK(header_size <= kMaxHeaderBytes, FormatError,
                "{}: got a header of {} bytes, expected at most {}. Is this a safetensors file?", where, header_size,
                kMaxHeaderBytes);
  MOESAIC_CHECK(header_size <= bytes.size - 8, FormatError, "{}: the header says {} bytes, but only {} follow: {}",
                where, header_size, bytes.size - 8, ends_early(bytes.size, header_size - (bytes.size - 8)));
  const Json header = parse_json(bytes.text(8, header_size), where + " (header)");
  MOESAIC_CHECK(header.is_object(), FormatError, "{}: the header is not a JSON object", where);

  const size_t data_size = bytes.size - 8 - header_size;
  std::vector<std::string> errors;
  size_t missing = 0;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      MOESAIC_CHECK(value.is_object(), FormatError, "{}: __metadata__ is not an object", where);
      for (const auto& [key, text] : value.items()) {
        MOESAIC_CHECK(text.is_string(), FormatError, "{}: __metadata__ '{}' is not a string", where, key);
        impl->metadata[key] = text.get<std::string>();
      }
      continue;
    }
    Entry entry;
    if (const std::string error = parse_entry(value, data_size, entry); !error.empty()) {
      const bool said = entry.beyond > 0 && missing > 0;  // of a file that ends early, one tensor is enough
      missing = std::max(missing, entry.beyond);
      if (said || errors.size() >= kMaxListedErrors) continue;
      errors.push_back(fmt::format("tensor '{}' {}", name.substr(0, 200), error));
      continue;
    }
    impl->names.push_back(name);
    impl->entries.emplace(name, std::move(entry));
  }
  MOESAIC_CHECK(errors.empty(), FormatError, "{}:\n  {}{}", where, fmt::join(errors, "\n  "),
                missing > 0 ? "\n" + ends_early(bytes.size, missing) : "");

  std::vector<const std::string*> by_offset;
  for (const auto& name : impl->names) by_offset.push_back(&name);
  std::sort(by_offset.begin(), by_offset.end(), [&](const std::string* a, const std::string* b) {
    const Entry &x = impl->entries[*a], &y = impl->entries[*b];
    return std::tie(x.begin, x.end) < std::tie(y.begin, y.end);
  });
  size_t expected = 0;
  for (const std::string* name : by_offset) {
    const Entry& entry = impl->entries[*name];
    MOESAIC_CHECK(entry.begin == expected, FormatError,
                  "{}: tensor '{}' begins at byte {}, expected {}: byte ranges {}", where, *name, entry.begin, expected,
                  entry.begin < expected ? "overlap" : "leave a hole");
    expected = entry.end;
  }
  MOESAIC_CHECK(expected == data_size, FormatError, "{}: the tensors end at data byte {}, but the file has {}", where,
                expected, data_size);
  impl->data = bytes.data + 8 + header_size;
  impl->bytes = std::move(bytes);
  impl_ = std::move(impl);
}

const std::vector<std::string>& SafetensorsFile::names() const { return impl_->names; }
bool SafetensorsFile::contains(const std::string& name) const { return impl_->entries.contains(name); }
at::ScalarType SafetensorsFile::dtype(const std::string& name) const { return impl_->at(name).dtype; }
std::vector<int64_t> SafetensorsFile::shape(const std::string& name) const { return impl_->at(name).shape; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return impl_->metadata; }

std::string_view SafetensorsFile::bytes(const std::string& name) const {
  const Entry& entry = impl_->at(name);
  return {reinterpret_cast<const char*>(impl_->data) + entry.begin, entry.end - entry.begin};
}

void SafetensorsFile::release(const std::string& name) const { impl_->bytes.release(bytes(name)); }

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& entry = impl_->at(name);
  auto* data = const_cast<uint8_t*>(impl_->data + entry.begin);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % c10::elementSize(entry.dtype) == 0;
  if (entry.begin == entry.end) return at::empty(entry.shape, entry.dtype);
  if (!aligned) {
    at::Tensor copy = at::empty(entry.shape, entry.dtype);
    std::memcpy(copy.data_ptr(), data, entry.end - entry.begin);
    return copy;
  }
  return at::from_blob(data, entry.shape, [owner = impl_](void*) {}, at::TensorOptions().dtype(entry.dtype));
}

}  // namespace moesaic::formats
