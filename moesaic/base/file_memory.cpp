#include "moesaic/base/file_memory.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <chrono>
#include <map>
#include <mutex>

#include "moesaic/base/json.h"
#include "moesaic/base/sha256.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

struct Memory {
  std::mutex mutex;
  fs::path folder;
  std::map<std::string, std::string> values;
};

Memory& memory() {
  static Memory memory;
  return memory;
}

/// What changes with every change of these files; "" when that can't be told.
std::string state_of(const std::vector<fs::path>& files) {
  constexpr int64_t kSettled = 2;  // seconds
  const int64_t now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::string state;
  for (const fs::path& file : files) {
    struct stat info{};
    if (::stat(file.c_str(), &info) != 0) return "";
    if (info.st_mtim.tv_sec > now - kSettled || info.st_ctim.tv_sec > now - kSettled) return "";
    state += fmt::format("{}\n{} {} {} {}.{:09} {}.{:09}\n", file.string(), info.st_dev, info.st_ino, info.st_size,
                         info.st_mtim.tv_sec, info.st_mtim.tv_nsec, info.st_ctim.tv_sec, info.st_ctim.tv_nsec);
  }
  return state;
}

}  // namespace

void set_file_memory(const fs::path& folder) {
  const std::lock_guard lock(memory().mutex);
  memory().folder = folder;
}

fs::path file_memory() {
  const std::lock_guard lock(memory().mutex);
  return memory().folder;
}

std::string remembered(const std::string& what, const std::vector<fs::path>& files,
                       const std::function<std::string()>& work) {
  const std::string state = state_of(files);
  if (state.empty()) return work();
  const std::string key = sha256_hex(what + "\n" + state);
  fs::path kept;
  {
    const std::lock_guard lock(memory().mutex);
    if (const auto found = memory().values.find(key); found != memory().values.end()) return found->second;
    if (!memory().folder.empty()) kept = memory().folder / key;
  }
  std::string value;
  std::error_code error;
  if (!kept.empty() && fs::is_regular_file(kept, error)) {
    value = read_file(kept);
  } else {
    value = work();
    if (state_of(files) != state) return value;  // changed meanwhile
    if (!kept.empty()) {
      try {
        fs::create_directories(kept.parent_path());
        write_file_atomically(kept, value);
      } catch (const std::exception&) {
        // Nothing depends on it: the work is done again.
      }
    }
  }
  const std::lock_guard lock(memory().mutex);
  memory().values[key] = value;
  return value;
}

std::string file_sha256(const fs::path& file) {
  return remembered("sha256", {file}, [&] { return sha256_of_file(file); });
}

}  // namespace moesaic
