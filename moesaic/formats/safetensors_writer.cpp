#include "moesaic/formats/safetensors_writer.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <unordered_map>

#include "moesaic/base/file_errors.h"
#include "moesaic/base/json.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/text.h"
#include "moesaic/formats/finite.h"
#include "moesaic/formats/safetensors_layout.h"

namespace moesaic::formats {
namespace {

constexpr size_t kMaxNamed = 10;

/// A file under a temporary name that takes its place with commit(); removed when that doesn't happen.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::filesystem::path& path) : path_(path), temporary_(temporary_name(path)) {
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    check(fd_ >= 0, "can't be created");
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(temporary_.c_str());
  }

  void write_at(size_t offset, const void* data, size_t size) {
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::pwrite(fd_, next, size, static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      check(written > 0, "can't be written");
      next += written;
      offset += static_cast<size_t>(written);
      size -= static_cast<size_t>(written);
    }
  }

  void commit() {
    check(::fsync(fd_) == 0, "can't be synced");
    const int closed = ::close(std::exchange(fd_, -1));
    check(closed == 0, "can't be closed");
    check(::rename(temporary_.c_str(), path_.c_str()) == 0, "can't be renamed");
    committed_ = true;
    const std::filesystem::path parent = path_.has_parent_path() ? path_.parent_path() : ".";
    if (const int folder = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); folder >= 0) {
      ::fsync(folder);
      ::close(folder);
    }
  }

 private:
  void check(bool fine, const char* what) const {
    MOESAIC_CHECK(fine, DataError, "{}: {}: {}", temporary_, what, refusal(errno));
  }

  std::filesystem::path path_;
  std::string temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

std::string dtype_name(at::ScalarType dtype, const std::string& where) {
  for (const StoredDtype& entry : kStoredDtypes) {
    if (dtype == entry.dtype) return entry.name;
  }
  throw DataError(fmt::format("{}: dtype {} can't be stored in safetensors", where, c10::toString(dtype)));
}

/// Where one tensor lies in the file, and whether it has come.
struct Place {
  std::vector<int64_t> shape;
  at::ScalarType dtype;
  size_t begin, bytes;
  bool here = false;
};

}  // namespace

struct SafetensorsWriter::Impl {
  Impl(const std::filesystem::path& path, const Declarations& tensors, std::map<std::string, std::string> metadata)
      : where(path.string()), file(path) {
    const std::string header = lay_out(tensors, std::move(metadata));
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(header.size() >> (8 * i));
    file.write_at(0, length, sizeof(length));
    file.write_at(sizeof(length), header.data(), header.size());
    for (auto& [_, place] : places) place.begin += sizeof(length) + header.size();
  }

  /// Gives every tensor its place, counted from the end of the header, and returns the header.
  std::string lay_out(const Declarations& tensors, std::map<std::string, std::string> metadata) {
    std::vector<const Declarations::value_type*> order;
    for (const auto& item : tensors) {
      MOESAIC_CHECK(item.first != "__metadata__", DataError, "{}: no tensor can be named __metadata__", where);
      MOESAIC_ASSERT(item.second.dtype.has_value());
      order.push_back(&item);
    }
    std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return c10::elementSize(*a->second.dtype) > c10::elementSize(*b->second.dtype);
    });
    metadata.emplace("format", "pt");
    OrderedJson header;
    header["__metadata__"] = metadata;
    size_t begin = 0;
    for (const auto* item : order) {
      const auto& [name, tensor] = *item;
      const size_t bytes = c10::multiply_integers(tensor.shape) * c10::elementSize(*tensor.dtype);
      header[name] = {{"dtype", dtype_name(*tensor.dtype, where + " '" + name + "'")},
                      {"shape", tensor.shape},
                      {"data_offsets", {begin, begin + bytes}}};
      places.emplace(name, Place{tensor.shape, *tensor.dtype, begin, bytes});
      begin += bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    MOESAIC_CHECK(text.size() <= kMaxHeaderBytes, DataError,
                  "{}: the header needs {} bytes, at most {} are allowed: spread the tensors over several files", where,
                  text.size(), kMaxHeaderBytes);
    return text;
  }

  std::string where;
  TemporaryFile file;
  std::unordered_map<std::string, Place> places;
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, const Declarations& tensors,
                                     std::map<std::string, std::string> metadata)
    : impl_(std::make_unique<Impl>(path, tensors, std::move(metadata))) {}
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter& SafetensorsWriter::operator=(SafetensorsWriter&&) noexcept = default;

void SafetensorsWriter::put(const std::string& name, const at::Tensor& tensor) {
  const auto found = impl_->places.find(name);
  MOESAIC_CHECK(found != impl_->places.end(), DataError, "{}: tensor '{}' was not declared", impl_->where, name);
  Place& place = found->second;
  MOESAIC_CHECK(!place.here, DataError, "{}: tensor '{}' comes twice", impl_->where, name);
  MOESAIC_CHECK(tensor.sizes() == place.shape && tensor.scalar_type() == place.dtype, DataError,
                "{}: tensor '{}': got {} {}, expected {} {}", impl_->where, name, c10::toString(tensor.scalar_type()),
                shape_text(tensor.sizes()), c10::toString(place.dtype), shape_text(place.shape));
  check_finite({{name, tensor}}, std::nullopt, impl_->where);
  const at::Tensor numbers = tensor.detach().cpu().contiguous();
  impl_->file.write_at(place.begin, numbers.const_data_ptr(), place.bytes);
  place.here = true;
}

void SafetensorsWriter::check_whole() const {
  std::vector<std::string> missing;
  for (const auto& [name, place] : impl_->places) {
    if (!place.here) missing.push_back(name);
  }
  std::sort(missing.begin(), missing.end());
  MOESAIC_CHECK(missing.empty(), DataError, "{}: {} tensors have not come: {}", impl_->where, missing.size(),
                fmt::join(missing.begin(), missing.begin() + std::min(missing.size(), kMaxNamed), ", "));
}

void SafetensorsWriter::commit() {
  check_whole();
  impl_->file.commit();
}

void check_unshared(const TensorMap& tensors, const std::string& where) {
  std::map<std::tuple<const void*, std::vector<int64_t>, std::vector<int64_t>>, std::string> seen;
  for (const auto& [name, tensor] : tensors) {
    MOESAIC_CHECK(tensor.defined(), DataError, "{}: tensor '{}' is undefined", where, name);
    if (tensor.numel() == 0) continue;
    const auto [it, fresh] = seen.emplace(
        std::tuple{static_cast<const void*>(tensor.const_data_ptr()), tensor.sizes().vec(), tensor.strides().vec()},
        name);
    MOESAIC_CHECK(fresh, DataError,
                  "{}: tensors '{}' and '{}' share their memory; tied weights are stored once: leave one out", where,
                  it->second, name);
  }
}

void save_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                      std::map<std::string, std::string> metadata) {
  check_unshared(tensors, path.string());
  SafetensorsWriter writer(path, declarations(tensors), std::move(metadata));
  for (const auto& [name, tensor] : tensors) writer.put(name, tensor);
  writer.commit();
}

}  // namespace moesaic::formats
