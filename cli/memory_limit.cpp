#include "cli/memory_limit.h"

#include <cxxabi.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <new>
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

/// Whether a limit on the address space (ulimit -v) is all but used up.
bool address_space_is_used_up() {
  constexpr rlim_t kNearly = rlim_t{256} << 20;
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return false;
  std::array<char, 64> text{};
  const int file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const ssize_t size = read(file, text.data(), text.size() - 1);
  close(file);
  rlim_t pages = 0;
  for (ssize_t i = 0; i < size && text[static_cast<size_t>(i)] >= '0'; ++i) {
    pages = 10 * pages + static_cast<rlim_t>(text[static_cast<size_t>(i)] - '0');
  }
  return pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + kNearly > limit.rlim_cur;
}

[[maybe_unused]] void on_fatal(int signal) {
  // std::terminate aborts with the exception that nobody caught.
  const std::type_info* thrown = signal == SIGABRT ? abi::__cxa_current_exception_type() : nullptr;
  const bool memory = thrown != nullptr && (*thrown == typeid(std::bad_alloc) || *thrown == typeid(std::system_error));
  if (memory || address_space_is_used_up()) end_out_of_memory();
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

ExitsAreMemory::ExitsAreMemory() {
  on_exit(on_exit_of_a_library, nullptr);
  g_running = true;
}

ExitsAreMemory::~ExitsAreMemory() { g_running = false; }

}  // namespace moesaic::cli
