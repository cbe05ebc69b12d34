#include "moesaic/formats/gguf_writer.h"

#include <ATen/ATen.h>

#include "moesaic/formats/gguf.h"

namespace moesaic::formats {
namespace {

constexpr uint32_t kMagic = 0x46554747, kVersion = 3, kFloat = 6, kString = 8;  // of values
constexpr size_t kAlignment = 32;  // of tensors: general.alignment's default

template <class T>
void put(std::string& bytes, T value) {
  static_assert(std::endian::native == std::endian::little);
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void put(std::string& bytes, const std::string& text) {
  put(bytes, static_cast<uint64_t>(text.size()));
  bytes += text;
}

void align(std::string& bytes) { bytes.append((kAlignment - bytes.size() % kAlignment) % kAlignment, '\0'); }

}  // namespace

void GgufWriter::add(const std::string& key, const std::string& value) {
  put(metadata_, key);
  put(metadata_, kString);
  put(metadata_, value);
  ++keys_;
}

void GgufWriter::add(const std::string& key, float value) {
  put(metadata_, key);
  put(metadata_, kFloat);
  put(metadata_, value);
  ++keys_;
}

void GgufWriter::add_tensor(const std::string& name, const at::Tensor& tensor) {
  tensors_.emplace_back(name, tensor.detach().to(at::kCPU, at::kFloat).contiguous());
}

std::string GgufWriter::bytes() const {
  std::string bytes, data;
  put(bytes, kMagic);
  put(bytes, kVersion);
  put(bytes, static_cast<uint64_t>(tensors_.size()));
  put(bytes, keys_);
  bytes += metadata_;
  for (const auto& [name, tensor] : tensors_) {
    put(bytes, name);
    put(bytes, static_cast<uint32_t>(tensor.dim()));
    for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) put(bytes, static_cast<uint64_t>(tensor.size(axis)));
    put(bytes, static_cast<uint32_t>(GgmlType::kF32));
    put(bytes, static_cast<uint64_t>(data.size()));
    data.append(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    align(data);
  }
  align(bytes);
  return bytes + data;
}

}  // namespace moesaic::formats
