// Files made byte by byte, so that a test can damage them.
#pragma once
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "moesaic/formats/bytes.h"
#include "tests/temporary_folder.h"

namespace moesaic::formats::test {

using moesaic::test::TemporaryFolder;

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// A number's bytes.
template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}
template <class T>
std::string raw_all(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// A safetensors file: the length, the header's text and the data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return raw<uint64_t>(header.size()) + header + data;
}

/// A GGUF file. Every count and offset can be made to lie.
class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;                  // of the data; the metadata says so only when asked
  std::optional<uint64_t> tensors, values;  // counts other than the true ones

  GgufBuilder& value(const std::string& key, uint32_t type, const std::string& payload) {
    metadata_ += text(key) + raw(type) + payload;
    ++value_count_;
    return *this;
  }
  GgufBuilder& u32(const std::string& key, uint32_t number) { return value(key, 4, raw(number)); }
  GgufBuilder& f32(const std::string& key, float number) { return value(key, 6, raw(number)); }
  GgufBuilder& boolean(const std::string& key, bool truth) { return value(key, 7, raw<uint8_t>(truth)); }
  GgufBuilder& string(const std::string& key, const std::string& content) { return value(key, 8, text(content)); }
  GgufBuilder& strings(const std::string& key, const std::vector<std::string>& items) {
    std::string payload = raw<uint32_t>(8) + raw<uint64_t>(items.size());
    for (const auto& item : items) payload += text(item);
    return value(key, 9, payload);
  }
  GgufBuilder& f32s(const std::string& key, const std::vector<float>& items) {
    return value(key, 9, raw<uint32_t>(6) + raw<uint64_t>(items.size()) + raw_all(items));
  }
  GgufBuilder& i32s(const std::string& key, const std::vector<int32_t>& items) {
    return value(key, 9, raw<uint32_t>(5) + raw<uint64_t>(items.size()) + raw_all(items));
  }

  /// `dims`: contiguous first, as GGUF stores them. Without an offset the tensor is put behind the last.
  GgufBuilder& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                      const std::string& data, std::optional<uint64_t> offset = std::nullopt) {
    rows_ += text(name) + raw<uint32_t>(dims.size()) + raw_all(dims) + raw(type) +
             raw<uint64_t>(offset.value_or(data_.size()));
    data_ += data;
    data_.resize((data_.size() + alignment - 1) / alignment * alignment);
    ++tensor_count_;
    return *this;
  }
  GgufBuilder& tensor(const std::string& name, const std::vector<uint64_t>& dims, const std::vector<float>& data) {
    return tensor(name, dims, 0, raw_all(data));
  }

  std::string build() const {
    std::string file = "GGUF" + raw(version) + raw(tensors.value_or(tensor_count_)) +
                       raw(values.value_or(value_count_)) + metadata_ + rows_;
    file.resize((file.size() + alignment - 1) / alignment * alignment);
    return file + data_;
  }
  Bytes bytes() const { return Bytes::from_string(build(), "test.gguf"); }

  static std::string text(const std::string& content) { return raw<uint64_t>(content.size()) + content; }

 private:
  std::string metadata_, rows_, data_;
  uint64_t value_count_ = 0, tensor_count_ = 0;
};

}  // namespace moesaic::formats::test

/// `statement` throws `Type` with all of the given pieces in its message.
#define EXPECT_ERROR(statement, Type, ...)                                     \
  do {                                                                         \
    try {                                                                      \
      statement;                                                               \
      ADD_FAILURE() << "nothing was thrown by " #statement;                    \
    } catch (const Type& error) {                                              \
      for (const std::string& piece : std::vector<std::string>{__VA_ARGS__}) { \
        EXPECT_THAT(error.what(), ::testing::HasSubstr(piece));                \
      }                                                                        \
    }                                                                          \
  } while (0)
