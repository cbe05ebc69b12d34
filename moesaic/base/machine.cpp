#include "moesaic/base/machine.h"

#include <signal.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fstream>
#include <thread>

namespace moesaic {
namespace {

/// The value of the first `key : value` line of a file; "" when there is none.
std::string line_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const size_t colon = line.find(':');
    const size_t begin = line.find_first_not_of(" \t", colon == std::string::npos ? colon : colon + 1);
    if (begin != std::string::npos) return line.substr(begin);
  }
  return "";
}

}  // namespace

std::string cpu_info(const std::string& key) {
  const std::string value = line_of("/proc/cpuinfo", key);
  return value.empty() ? "unknown" : value;
}

Machine this_machine() {
  utsname system{};
  uname(&system);
  return {cpu_info("model name"), std::thread::hardware_concurrency(), sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE),
          std::string(system.sysname) + " " + system.release + " " + system.machine};
}

int64_t peak_resident_bytes() {
  const std::string kib = line_of("/proc/self/status", "VmHWM");
  return kib.empty() ? 0 : std::stoll(kib) * 1024;
}

void outlive_closed_pipes() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

}  // namespace moesaic
