// GGUF, versions 2 and 3: metadata, tensor table and dequantisation. Knows no model.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "moesaic/formats/bytes.h"

namespace moesaic::formats {

/// ggml's tensor types that can be read.
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kBF16 = 30,
};

/// How a type packs its elements: `bytes` hold `elements`, which lie in one row.
struct GgmlTypeInfo {
  GgmlType type;
  const char* name;
  int64_t elements;
  int64_t bytes;
};
const GgmlTypeInfo& ggml_type_info(GgmlType type);

/// Dequantises `count` elements (whole blocks) to float32; bit for bit what ggml's reference computes.
void dequantize(GgmlType type, const uint8_t* blocks, int64_t count, float* out);

/// An array of the metadata. Strings are views of the file.
struct GgufArray {
  uint32_t type = 0;  // GGUF value type of the elements
  uint64_t count = 0;
  const uint8_t* data = nullptr;          // numbers, little-endian and unaligned
  std::vector<std::string_view> strings;  // when the elements are strings
};

/// Strings are views of the file.
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string_view, GgufArray>;

/// One row of the tensor table. `shape` is in PyTorch's order: outermost first, the last is contiguous.
struct GgufTensor {
  std::string name;
  GgmlType type;
  std::vector<int64_t> shape;
  std::string_view bytes;
};

/// A parsed GGUF file; every count, length and offset is checked before use, and nothing is allocated on a count's
/// word.
class GgufFile {
 public:
  /// Throws FormatError.
  explicit GgufFile(Bytes bytes);

  const Bytes& bytes() const { return bytes_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  bool contains(const std::string& key) const { return metadata_.contains(key); }
  /// The keys that begin with `prefix`.
  std::vector<std::string> keys(const std::string& prefix) const {
    std::vector<std::string> keys;
    for (auto it = metadata_.lower_bound(prefix); it != metadata_.end() && it->first.starts_with(prefix); ++it) {
      keys.push_back(it->first);
    }
    return keys;
  }

  /// The value of `key`; nullopt when absent. Throws FormatError when it has another type, is negative or not finite.
  std::optional<uint64_t> find_uint(const std::string& key) const;
  std::optional<double> find_number(const std::string& key) const;
  std::optional<bool> find_bool(const std::string& key) const;
  std::optional<std::string> find_string(const std::string& key) const;
  /// The strings of an array; empty when absent. Every one is valid UTF-8.
  std::vector<std::string_view> strings(const std::string& key) const;
  /// The numbers of an array; empty when absent.
  std::vector<double> numbers(const std::string& key) const;

 private:
  const GgufValue* find(const std::string& key) const;

  Bytes bytes_;
  std::map<std::string, GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace moesaic::formats
