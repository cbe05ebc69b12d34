#include "moesaic/formats/bytes.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"

namespace moesaic::formats {

Bytes Bytes::map(const std::filesystem::path& path) {
  const std::string where = path.string();
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer would wait
  MOESAIC_CHECK(fd >= 0, DataError, "{}: can't be opened: {}", where, refusal(errno));
  struct stat status{};
  const bool regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  const auto size = regular ? static_cast<size_t>(status.st_size) : 0;
  void* address = size > 0 ? ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  const int map_error = errno;
  ::close(fd);
  MOESAIC_CHECK(regular, DataError, "{}: is not a regular file", where);
  MOESAIC_CHECK(size > 0, FormatError, "{}: {}", where, ends_early(0));
  if (address == MAP_FAILED) throw std::system_error(map_error, std::generic_category(), where + ": can't be mapped");
  ::madvise(address, size, MADV_WILLNEED);

  std::shared_ptr<const void> owner(address, [size](const void* p) { ::munmap(const_cast<void*>(p), size); });
  return {static_cast<const uint8_t*>(address), size, std::move(owner), where, true};
}

void Bytes::release(std::string_view part) const {
  if (!mapped) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(part.data());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + part.size()) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

Bytes Bytes::from_string(std::string content, std::string where) {
  auto owner = std::make_shared<const std::string>(std::move(content));
  const auto* data = reinterpret_cast<const uint8_t*>(owner->data());
  return {data, owner->size(), owner, std::move(where)};
}

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

}  // namespace moesaic::formats
