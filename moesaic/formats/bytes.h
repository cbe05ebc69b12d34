// Read-only bytes with an owner: a mapped file, or memory. The readers work on this, so tests and fuzzers need no file.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace moesaic::formats {

/// Read-only bytes. `owner` keeps them alive; `where` names them in messages.
struct Bytes {
  const uint8_t* data = nullptr;
  size_t size = 0;
  std::shared_ptr<const void> owner;
  std::string where;
  bool mapped = false;  // from a file

  /// Maps a regular file. Throws DataError when it can't be opened, FormatError when it is empty.
  static Bytes map(const std::filesystem::path& path);
  /// Takes over `content`.
  static Bytes from_string(std::string content, std::string where);

  /// Gives back the memory that holds `part` of a mapped file; reading it again brings it back.
  void release(std::string_view part) const;

  std::string_view text(size_t offset, size_t length) const {
    return {reinterpret_cast<const char*>(data) + offset, length};
  }
};

/// False also for what can't be looked at: a link that points to itself, a folder without permission.
bool is_there(const std::filesystem::path& path);

}  // namespace moesaic::formats
