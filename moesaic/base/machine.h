// What machine this is, and what the process has taken of it.
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

}  // namespace moesaic
