#include "moesaic/eval/code_runner.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "moesaic/base/check.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

#if defined(__x86_64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_AARCH64;
#else
#error "moesaic/eval/code_runner.cpp: name the audit architecture of this machine"
#endif

constexpr int kPassedStatus = 42;  // of the interpreter; 0 is what sys.exit() in the program would give

// The program's own exit must not look like its end, and what it leaves running must not hold up the interpreter's.
constexpr const char* kMain = R"(import os
try:
    with open("program.py", "rb") as file:
        program = compile(file.read(), "program.py", "exec")
    exec(program, {})
except BaseException:
    os._exit(1)
os._exit(42)
)";

/// System calls that are refused whatever their arguments are.
constexpr int kRefused[] = {
    // the network, and a second way to it
    SYS_socket, SYS_socketpair, SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
// processes
#ifdef SYS_fork
    SYS_fork, SYS_vfork,
#endif
    SYS_tkill, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_pidfd_open, SYS_pidfd_getfd, SYS_pidfd_send_signal,
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_setns, SYS_unshare, SYS_setpriority,
// what Landlock leaves open on files
#ifdef SYS_chmod
    SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat,
#endif
    SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat, SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr,
    SYS_removexattr, SYS_lremovexattr, SYS_fremovexattr, SYS_open_by_handle_at,
    // memory that outlives the process
    SYS_shmget, SYS_semget, SYS_msgget, SYS_mq_open, SYS_add_key, SYS_request_key, SYS_keyctl,
    // the machine
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_reboot,
    SYS_kexec_load, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_swapon, SYS_swapoff, SYS_acct,
    SYS_quotactl, SYS_sethostname, SYS_setdomainname, SYS_settimeofday, SYS_clock_settime, SYS_adjtimex,
    SYS_clock_adjtime};

/// A seccomp filter that is put together without allocating: between fork and exec malloc may be locked for ever.
class Filter {
 public:
  Filter() {
    load(offsetof(seccomp_data, arch));
    add(BPF_JMP | BPF_JEQ | BPF_K, kArchitecture, 1, 0);
    add(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    load(offsetof(seccomp_data, nr));
#if defined(__x86_64__)
    constexpr uint32_t kX32 = 0x40000000;  // the same calls under other numbers
    add(BPF_JMP | BPF_JGE | BPF_K, kX32, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
#endif
    for (int call : kRefused) refuse(call, EPERM);
    refuse(SYS_clone3, ENOSYS);  // its flags lie in memory; the C library then uses clone
    // Threads, no processes.
    add(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 4);
    load(offsetof(seccomp_data, args[0]));
    add(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    // Signals and limits for itself alone (abort() sends one).
    const uint32_t self = static_cast<uint32_t>(getpid());
    only_for(SYS_kill, self, self);
    only_for(SYS_tgkill, self, self);
    only_for(SYS_prlimit64, self, 0);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  }

  bool install() const {
    const sock_fprog program{static_cast<unsigned short>(size_), const_cast<sock_filter*>(code_.data())};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
  }

 private:
  void add(int operation, uint32_t value, uint8_t jump_true = 0, uint8_t jump_false = 0) {
    code_[size_++] = {static_cast<uint16_t>(operation), jump_true, jump_false, value};
  }
  void load(size_t offset) { add(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset)); }
  void refuse(int call, uint32_t error) {
    add(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
  }
  /// Allows `call` when its first argument is one of two values (low half: process ids are 32 bits).
  void only_for(int call, uint32_t a, uint32_t b) {
    add(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 5);
    load(offsetof(seccomp_data, args[0]));
    add(BPF_JMP | BPF_JEQ | BPF_K, a, 1, 0);
    add(BPF_JMP | BPF_JEQ | BPF_K, b, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
  }

  std::array<sock_filter, 2 * std::size(kRefused) + 40> code_;
  size_t size_ = 0;
};

int landlock_version() {
  return static_cast<int>(syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION));
}

/// Lets this process write below the working folder only.
bool restrict_writes(int version) {
  constexpr uint64_t kTruncate = uint64_t{1} << 14;  // LANDLOCK_ACCESS_FS_TRUNCATE, newer than some kernels' headers
  uint64_t writes = LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_REMOVE_FILE |
                    LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG |
                    LANDLOCK_ACCESS_FS_MAKE_SOCK | LANDLOCK_ACCESS_FS_MAKE_FIFO | LANDLOCK_ACCESS_FS_MAKE_BLOCK |
                    LANDLOCK_ACCESS_FS_MAKE_SYM;
  if (version >= 2) writes |= LANDLOCK_ACCESS_FS_REFER;
  if (version >= 3) writes |= kTruncate;
  struct {
    uint64_t handled;
  } attributes{writes};
  const int rules = static_cast<int>(syscall(SYS_landlock_create_ruleset, &attributes, sizeof(attributes), 0));
  const int folder = open(".", O_PATH | O_DIRECTORY);
  landlock_path_beneath_attr below{};
  below.allowed_access = writes;
  below.parent_fd = folder;
  const bool done = rules >= 0 && folder >= 0 &&
                    syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &below, 0) == 0 &&
                    syscall(SYS_landlock_restrict_self, rules, 0) == 0;
  close(rules);
  close(folder);
  return done;
}

bool limit(int resource, rlim_t soft, rlim_t hard) {
  const rlimit value{soft, hard};
  return setrlimit(static_cast<__rlimit_resource_t>(resource), &value) == 0;
}

/// Everything between fork and exec; allocates nothing. Returns only when something could not be set up.
void become_program(const char* python, const char* folder, const RunLimits& limits, int landlock) {
  setsid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int nothing = open("/dev/null", O_RDWR);
  for (int standard : {0, 1, 2}) {
    if (dup2(nothing, standard) < 0) return;
  }
  if (syscall(SYS_close_range, 3, ~0U, 0) != 0 || chdir(folder) != 0) return;
  // Refused by some kernels and containers; the filter below keeps the network shut without it.
  if (unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0) errno = 0;
  const rlim_t cpu = static_cast<rlim_t>(limits.cpu_seconds);
  const rlim_t file = static_cast<rlim_t>(limits.file_size), memory = static_cast<rlim_t>(limits.memory);
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return;
  if (landlock >= 1 && !restrict_writes(landlock)) return;
  if (!limit(RLIMIT_CPU, cpu, cpu + 1) || !limit(RLIMIT_FSIZE, file, file) || !limit(RLIMIT_CORE, 0, 0) ||
      !limit(RLIMIT_NOFILE, 64, 64) || !limit(RLIMIT_AS, memory, memory)) {
    return;
  }
  if (!Filter().install()) return;
  // The seed fixes the order of sets of strings, so that a program passes always or never.
  const char* const arguments[] = {python, "-s", "-B", "-X", "utf8", "-c", kMain, nullptr};
  const char* const environment[] = {"PYTHONHASHSEED=0", nullptr};
  execve(python, const_cast<char* const*>(arguments), const_cast<char* const*>(environment));
}

/// A new folder that is removed with all it holds.
class WorkingFolder {
 public:
  WorkingFolder() : path_((fs::temp_directory_path() / fmt::format("moesaic_program_{}_XXXXXX", getpid())).string()) {
    MOESAIC_CHECK(mkdtemp(path_.data()) != nullptr, DataError, "can't make a folder for a program to run in: {}: {}",
                  path_, std::strerror(errno));
  }
  ~WorkingFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  WorkingFolder(const WorkingFolder&) = delete;
  WorkingFolder& operator=(const WorkingFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// The interpreter itself: `python3` on the PATH may be a script that starts it, which needs its environment.
std::string find_python() {
  FILE* answer = popen("python3 -c 'import sys; print(sys.executable)' 2>/dev/null", "r");
  std::string path;
  for (int c; answer && (c = std::fgetc(answer)) != EOF && c != '\n';) path += static_cast<char>(c);
  if (answer) pclose(answer);
  MOESAIC_CHECK(!path.empty(), UsageError,
                "metric pass@1 runs programs with python3, and there is none on the PATH. Install it, or choose other "
                "--metrics.");
  return path;
}

/// Waits for the end of `process`, at most `seconds`. False when it is still running then.
bool ended_within(pid_t process, double seconds) {
  const int handle = static_cast<int>(syscall(SYS_pidfd_open, process, 0));
  if (handle < 0) return false;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  pollfd ready{handle, POLLIN, 0};
  int events = 0;
  do {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    events = poll(&ready, 1, static_cast<int>(std::max<int64_t>(0, left.count())));
  } while (events < 0 && errno == EINTR);
  close(handle);
  return events > 0;
}

}  // namespace

const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::kPassed: return "passed";
    case Verdict::kFailed: return "failed";
    case Verdict::kTimedOut: return "timed out";
    case Verdict::kKilled: return "killed";
  }
  return "";
}

CodeRunner::CodeRunner(const RunLimits& limits) : limits_(limits), python_(find_python()) {
  if (landlock_version() < 1) {
    spdlog::warn("this kernel has no Landlock: the programs that pass@1 runs can write wherever you can");
  }
  MOESAIC_CHECK(run("assert 1 + 1 == 2") == Verdict::kPassed && run("assert 1 + 1 == 3") == Verdict::kFailed,
                UsageError,
                "{} does not run the simplest program under the limits of pass@1 (seccomp filter, {} MiB of memory)",
                python_, limits_.memory >> 20);
}

Verdict CodeRunner::run(const std::string& program) const {
  const WorkingFolder folder;
  {
    std::ofstream file(folder.path() + "/program.py", std::ios::binary);
    file << program;
    MOESAIC_CHECK(file.flush(), DataError, "can't write {}/program.py", folder.path());
  }
  const int landlock = landlock_version();
  const pid_t process = fork();
  MOESAIC_CHECK(process >= 0, DataError, "can't start a process for a program: {}", std::strerror(errno));
  if (process == 0) {
    become_program(python_.c_str(), folder.path().c_str(), limits_, landlock);
    _exit(1);
  }
  const bool ended = ended_within(process, limits_.seconds);
  // It could start no other process, so with it everything is gone.
  if (!ended) kill(process, SIGKILL);
  int status = 0;
  while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
  }
  if (!ended || (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU)) return Verdict::kTimedOut;
  if (WIFSIGNALED(status)) return Verdict::kKilled;
  return WEXITSTATUS(status) == kPassedStatus ? Verdict::kPassed : Verdict::kFailed;
}

std::string code_in(const std::string& answer) {
  const std::string fence = "```";
  const size_t first = answer.find(fence);
  if (first == std::string::npos) return answer;
  const std::string before = answer.substr(0, first);
  const size_t line_end = answer.find('\n', first);
  const size_t second = answer.find(fence, first + fence.size());
  const bool named =
      first + fence.size() < answer.size() && std::isalpha(static_cast<unsigned char>(answer[first + fence.size()]));
  const bool indented = !before.empty() && (before[0] == ' ' || before[0] == '\t');  // the body of a function
  const bool blank = before.find_first_not_of(" \t\r\n") == std::string::npos;
  const bool opens = blank || (!indented && (named || second != std::string::npos));
  if (!opens) return before;
  if (line_end == std::string::npos) return "";
  return answer.substr(line_end + 1,
                       second == std::string::npos ? second : std::max(second, line_end + 1) - line_end - 1);
}

}  // namespace moesaic::eval
