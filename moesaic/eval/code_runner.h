// Runs Python programs that a model wrote, shut off from the network, from other processes and from the file system.
#pragma once
#include <string>

namespace moesaic::eval {

enum class Verdict { kPassed, kFailed, kTimedOut, kKilled };
/// passed | failed | timed out | killed.
const char* name_of(Verdict verdict);

struct RunLimits {
  int cpu_seconds = 10;
  double seconds = 30;                   // of the clock; more than of the CPU, so that a busy machine fails no program
  int64_t memory = int64_t{1} << 30;     // bytes of address space
  int64_t file_size = int64_t{1} << 24;  // bytes of any one file
};

/// Each program runs in a `python3` of its own, whose working folder is new and removed afterwards, with the limits
/// above, an empty environment (but a fixed hash seed), no standard input and its output discarded.
///
/// The kernel refuses it (seccomp filter): sockets, new processes (threads are allowed), signals to others, tracing,
/// mounts, changes of owners and modes. Where the kernel has Landlock, also every write outside the working folder;
/// where it allows user namespaces, it has a network of its own without a device. It can read what the user can.
/// This guards against what a model writes by accident; it is no prison for code that is out to break it.
class CodeRunner {
 public:
  /// Throws UsageError when there is no python3, or it does not run in here.
  explicit CodeRunner(const RunLimits& limits = {});

  /// kPassed: the program ran to its end. kFailed: an exception (a failed assert, no memory, a refused call), or
  /// sys.exit() with whatever status. kKilled: a signal, as from a stack overflow. Never hangs, leaves no process.
  Verdict run(const std::string& program) const;

 private:
  RunLimits limits_;
  std::string python_;
};

/// The code in an answer: what its first fenced block (```) holds, or the answer itself when it has none. A fence that
/// only ends code which began without one cuts there.
std::string code_in(const std::string& answer);

}  // namespace moesaic::eval
