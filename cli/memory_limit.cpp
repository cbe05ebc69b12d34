#include "cli/memory_limit.h"

#include <cxxabi.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <typeinfo>

#include "moesaic/base/check.h"

namespace moesaic::cli {
namespace {

std::atomic<bool> g_running = false;

// What a handler may do: nothing here allocates.

void end(ExitCode code, std::string_view message) {
  [[maybe_unused]] const ssize_t said = write(STDERR_FILENO, message.data(), message.size());
  _exit(static_cast<int>(code));
}

void end_out_of_memory() {
  end(ExitCode::kOutOfMemory,
      "error: out of memory or threads. Try a smaller batch, fewer --threads or a higher limit.\n");
}

/// Whether a limit on the address space (ulimit -v) or on data (ulimit -d, obey_group_limit()) is all but used up.
bool memory_is_used_up() {
  constexpr rlim_t kNearly = rlim_t{256} << 20;
  std::array<char, 128> text{};
  const int file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const ssize_t size = read(file, text.data(), text.size() - 1);
  close(file);
  std::array<rlim_t, 7> pages{};  // of the whole address space; resident, shared, text, 0; of data and stack; 0
  size_t column = 0;
  for (ssize_t i = 0; i < size && column < pages.size(); ++i) {
    const char c = text[static_cast<size_t>(i)];
    if (c < '0') {
      ++column;
    } else {
      pages[column] = 10 * pages[column] + static_cast<rlim_t>(c - '0');
    }
  }
  const auto page = static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
  auto used_up = [&](auto resource, rlim_t used) {
    rlimit limit{};
    return getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
           used * page + kNearly > limit.rlim_cur;
  };
  return used_up(RLIMIT_AS, pages[0]) || used_up(RLIMIT_DATA, pages[5]);
}

/// The limit on memory of the control group at `path` below `root` and of those around it, in bytes; the largest number
/// where there is none.
uint64_t group_limit(const std::string& root, std::string path, const char* file) {
  uint64_t least = UINT64_MAX;
  while (true) {
    uint64_t bytes = 0;
    if (std::ifstream(root + path + "/" + file) >> bytes) least = std::min(least, bytes);  // "max" is no number
    if (path.empty() || path == "/") return least;
    path.erase(path.rfind('/'));
  }
}

[[maybe_unused]] void on_fatal(int signal) {
  // std::terminate aborts with the exception that nobody caught.
  const std::type_info* thrown = signal == SIGABRT ? abi::__cxa_current_exception_type() : nullptr;
  const bool memory = thrown != nullptr && (*thrown == typeid(std::bad_alloc) || *thrown == typeid(std::system_error));
  if (memory || memory_is_used_up()) end_out_of_memory();
  if (signal == SIGBUS) {
    end(ExitCode::kData, "error: a file that was being read became shorter, or its disk failed.\n");
  }
  std::signal(signal, SIG_DFL);
  raise(signal);
}

#ifndef MOESAIC_SANITIZE
/// Runs before the constructors of the libraries, which allocate, too.
void catch_fatal_signals(int, char**, char**) {
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS}) std::signal(signal, on_fatal);
}

[[gnu::section(".preinit_array"), gnu::used]] void (*const kCatch)(int, char**, char**) = catch_fatal_signals;
#endif

void on_exit_of_a_library(int status, void*) {
  if (g_running && status != 0) end_out_of_memory();
}

}  // namespace

void obey_group_limit() {
  if (access("/dev/nvidiactl", F_OK) == 0) return;
  uint64_t bytes = UINT64_MAX;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // id:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (controllers.empty()) bytes = std::min(bytes, group_limit("/sys/fs/cgroup", path, "memory.max"));
    if (controllers == "memory") {
      bytes = std::min(bytes, group_limit("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes"));
    }
  }
  rlimit limit{};
  const rlim_t ours = bytes / 20 * 19;  // the rest is for what is no data of ours: page tables, pages of files
  if (getrlimit(RLIMIT_DATA, &limit) != 0 || ours >= limit.rlim_cur) return;
  limit.rlim_cur = ours;
  setrlimit(RLIMIT_DATA, &limit);
}

uint64_t memory_of_machine() {
  uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  for (const auto resource : {RLIMIT_DATA, RLIMIT_AS}) {  // a control group's limit is one of these, by now
    rlimit limit{};
    if (getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
      bytes = std::min<uint64_t>(bytes, limit.rlim_cur);
  }
  return bytes;
}

ExitsAreMemory::ExitsAreMemory() {
  on_exit(on_exit_of_a_library, nullptr);
  g_running = true;
}

ExitsAreMemory::~ExitsAreMemory() { g_running = false; }

}  // namespace moesaic::cli
