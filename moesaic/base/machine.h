// What machine this is, what the process has taken of it, and what it outlives.
#pragma once
#include <cstdint>
#include <string>

namespace moesaic {

struct Machine {
  std::string cpu;           // its model name; "unknown"
  int64_t cores = 0;         // logical ones
  int64_t memory_bytes = 0;  // of the whole machine
  std::string system;        // "Linux 6.1.0 x86_64"
};
Machine this_machine();

/// The value of the first `key : value` line of /proc/cpuinfo; "unknown".
std::string cpu_info(const std::string& key);
/// The most memory that the process has held so far (VmHWM), in bytes; 0 where the system doesn't say.
int64_t peak_resident_bytes();
/// From here on a write to what the other side has closed fails with EPIPE in this thread and in those that it starts,
/// where SIGPIPE would end the process.
void outlive_closed_pipes();

}  // namespace moesaic
