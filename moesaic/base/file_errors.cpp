#include "moesaic/base/file_errors.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace moesaic {
namespace {

const char* hint_for(int error) {
  switch (error) {
    case EACCES:
    case EPERM: return "look at the rights of the file and of the folders above it (ls -ld), or name another place";
    case ENOSPC:
    case EDQUOT: return "make room there (df -h), or name a place on another disk";
    case EROFS: return "name a place that can be written";
    case ENOTDIR:
    case EEXIST: return "a file stands where a folder is expected; name another place";
    case ENOENT: return "look at the spelling, and at the folders above it";
    case ELOOP: return "a link leads back to itself";
    case ENAMETOOLONG: return "choose a shorter name";
    case EMFILE:
    case ENFILE: return "raise the limit on open files (ulimit -n)";
    case EFBIG: return "raise the limit on a file's size (ulimit -f)";
    default: return nullptr;
  }
}

/// The standard library's words for what it was doing, as ours.
constexpr std::pair<std::string_view, const char*> kDoings[] = {
    {"cannot create director", "the folder can't be made"},  // -y, -ies
    {"directory iterator cannot open directory", "the folder can't be read"},
    {"directory iterator cannot advance", "the folder can't be read"},
    {"recursive directory iterator", "the folder can't be read"},
    {"cannot get file size", "its size can't be read"},
    {"cannot get file time", "its time can't be read"},
    {"cannot set file time", "its time can't be set"},
    {"cannot remove", "can't be removed"},
    {"cannot rename", "can't be renamed"},
    {"cannot copy", "can't be copied"},
    {"cannot check file equivalence", "can't be looked at"},
    {"cannot make canonical path", "can't be looked at"},
    {"status", "can't be looked at"},
    {"symlink_status", "can't be looked at"},
};

}  // namespace

std::string refusal(int error) {
  const char* hint = hint_for(error);
  return hint == nullptr ? std::strerror(error) : fmt::format("{}\nhint: {}", std::strerror(error), hint);
}

std::string message_of(const std::filesystem::filesystem_error& error) {
  constexpr std::string_view kBefore = "filesystem error: ";
  std::string_view doing = error.what();
  if (doing.starts_with(kBefore)) doing.remove_prefix(kBefore.size());
  const char* words = "can't be used";
  for (const auto& [library, ours] : kDoings) {
    if (!doing.starts_with(library)) continue;
    words = ours;
    break;
  }
  const std::string other = error.path2().empty() ? "" : fmt::format(" (with {})", error.path2().string());
  return fmt::format("{}{}: {}: {}", error.path1().string(), other, words, refusal(error.code().value()));
}

std::string ends_early(uint64_t bytes, uint64_t missing) {
  return fmt::format(
      "the file is truncated: {} bytes are there, {} missing\nhint: a download may have been cut; fetch "
      "the file again",
      bytes, missing > 0 ? fmt::format("{} are", missing) : "more are");
}

}  // namespace moesaic
