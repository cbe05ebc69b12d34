// Ends of the program that no exception tells of: libraries that abort, crash or exit where memory or threads run out.
#pragma once
#include <cstdint>

namespace moesaic::cli {

/// Under a control group's limit on memory, allocations fail before the kernel would kill the process. Not where there
/// are GPUs: CUDA maps more than it uses.
void obey_group_limit();

/// Bytes of memory that this process may use: the machine's, or less by a limit on it.
uint64_t memory_of_machine();

/// While it lives, exit() called by a library (libgomp, when a thread can't be made) ends the program with
/// kOutOfMemory.
class ExitsAreMemory {
 public:
  ExitsAreMemory();
  ~ExitsAreMemory();
  ExitsAreMemory(const ExitsAreMemory&) = delete;
  ExitsAreMemory& operator=(const ExitsAreMemory&) = delete;
};

}  // namespace moesaic::cli
