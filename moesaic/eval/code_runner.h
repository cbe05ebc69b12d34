// Runs Python programs that a model wrote, shut off from the network, from other processes and from the file system.
#pragma once
#include <cstdint>
#include <memory>
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
  int64_t all_files_size = int64_t{1} << 27;  // bytes of all its files together
};

/// A program runs in a `python3` of its own and its tests in another, so that a pass is the word of a process the
/// program can't reach: what the tests name and do not define is asked of the program's process. Data goes between them
/// by value and an object of the program's equals no data; so nothing but right answers makes an assertion hold. Each
/// has a working folder that is new and removed afterwards (by a process of its own, however the evaluation ends), the
/// limits above, an empty environment (but a fixed hash seed), and its output discarded.
///
/// A seccomp filter allows what computing, threads and files in the folder need and refuses the rest: sockets, new
/// processes, signals to others, tracing, owners, modes and flags of files. Where the kernel has Landlock, also every
/// write outside the working folder; where it allows user namespaces, it has a network of its own without a device. It
/// can read what the user can. This guards against what a model writes by accident; it is no prison for code that is
/// out to break it.
class CodeRunner {
 public:
  /// Throws UsageError when there is no python3, or it does not run in here.
  explicit CodeRunner(const RunLimits& limits = {});
  ~CodeRunner();

  /// kPassed: the program and then the tests ran to their end. kFailed: an exception (a failed assert, no memory, a
  /// refused call), or the program left with whatever status. kKilled: a signal, as from a stack overflow, or too many
  /// files. Never hangs, leaves no process.
  Verdict run(const std::string& program, const std::string& tests) const;

 private:
  class Keeper;

  RunLimits limits_;
  std::string python_;
  std::unique_ptr<Keeper> keeper_;
};

/// The code in an answer: what its first fenced block (```) holds, or the answer itself when it has none. A fence that
/// only ends code which began without one cuts there.
std::string code_in(const std::string& answer);

}  // namespace moesaic::eval
