#include "moesaic/eval/code_runner.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
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
#include "moesaic/eval/sandbox.h"

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

constexpr const char* kFolderName = "moesaic_programs_";  // then the number of the evaluation's process
constexpr int kPassedStatus = 42;                         // of the process that runs the tests

/// System calls of a Python program that computes, has threads and works on files in its folder. All others are
/// refused.
constexpr int kAllowed[] = {
#if defined(__x86_64__)
    // the older forms of the same
    SYS_open, SYS_stat, SYS_lstat, SYS_access, SYS_readlink, SYS_mkdir, SYS_rmdir, SYS_unlink, SYS_rename, SYS_link,
    SYS_symlink, SYS_getdents, SYS_dup2, SYS_pipe, SYS_poll, SYS_select, SYS_epoll_create, SYS_epoll_wait, SYS_time,
    SYS_alarm, SYS_pause, SYS_getpgrp, SYS_arch_prctl,
#endif
    // files that are open, and their waiting
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_lseek, SYS_close, SYS_close_range,
    SYS_fstat, SYS_fstatfs, SYS_ftruncate, SYS_fallocate, SYS_fadvise64, SYS_fsync, SYS_fdatasync, SYS_flock, SYS_dup,
    SYS_dup3, SYS_pipe2, SYS_ppoll, SYS_pselect6, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_eventfd2,
    SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime, SYS_sendfile, SYS_copy_file_range, SYS_getdents64,
    // names of files: Landlock says where
    SYS_openat, SYS_newfstatat, SYS_statx, SYS_statfs, SYS_faccessat, SYS_faccessat2, SYS_readlinkat, SYS_getcwd,
    SYS_chdir, SYS_fchdir, SYS_mkdirat, SYS_unlinkat, SYS_renameat, SYS_renameat2, SYS_linkat, SYS_symlinkat,
    SYS_truncate, SYS_umask, SYS_getxattr, SYS_lgetxattr, SYS_fgetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr,
    // memory
    SYS_brk, SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise, SYS_msync, SYS_mincore, SYS_membarrier,
    // threads and signals of its own
    SYS_futex, SYS_set_robust_list, SYS_get_robust_list, SYS_set_tid_address, SYS_rseq, SYS_sched_yield,
    SYS_sched_getaffinity, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigpending, SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait, SYS_sigaltstack, SYS_getitimer, SYS_setitimer, SYS_wait4, SYS_waitid, SYS_execve, SYS_exit,
    SYS_exit_group,
    // time and what it is told of itself and the machine
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_times, SYS_getrandom,
    SYS_getpid, SYS_getppid, SYS_gettid, SYS_getpgid, SYS_getsid, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid,
    SYS_getresuid, SYS_getresgid, SYS_getgroups, SYS_getpriority, SYS_getrusage, SYS_getrlimit, SYS_uname, SYS_sysinfo,
    SYS_getcpu};
constexpr int kFileControls[] = {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD,     F_SETFD,     F_GETFL,      F_GETLK,
                                 F_SETLK, F_SETLKW,        F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_GETPIPE_SZ};
constexpr int kDeviceControls[] = {TCGETS, TIOCGWINSZ, FIONBIO, FIONREAD, FIOCLEX, FIONCLEX};
constexpr int kProcessControls[] = {PR_SET_NAME, PR_GET_NAME};

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
    for (const int call : kAllowed) allow(static_cast<uint32_t>(call));
    // Its flags lie in memory; the C library then uses clone.
    add(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    // Threads, no processes.
    only_with(SYS_clone, 0, [&] { allow_bits(CLONE_THREAD); });
    // Signals and limits for itself alone (abort() sends one).
    const uint32_t self = static_cast<uint32_t>(getpid());
    for (const int call : {SYS_kill, SYS_tgkill}) only_with(call, 0, [&] { allow(self); });
    only_with(SYS_prlimit64, 0, [&] {
      allow(0);
      allow(self);
    });
    // No owner of signals, no flags of files, nothing that a device might do.
    only_with(SYS_fcntl, 1, [&] {
      for (const int control : kFileControls) allow(static_cast<uint32_t>(control));
      add(BPF_JMP | BPF_JEQ | BPF_K, F_SETFL, 0, 4);
      load(offsetof(seccomp_data, args[2]));
      add(BPF_JMP | BPF_JSET | BPF_K, O_ASYNC, 1, 0);
      add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
      refuse();
    });
    only_with(SYS_ioctl, 1, [&] {
      for (const int control : kDeviceControls) allow(static_cast<uint32_t>(control));
    });
    only_with(SYS_prctl, 0, [&] {
      for (const int control : kProcessControls) allow(static_cast<uint32_t>(control));
    });
    refuse();
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
  void refuse() { add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM); }
  /// Allows the call when what was loaded last is `value`.
  void allow(uint32_t value) {
    add(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  }
  /// Allows it when one of `bits` is set.
  void allow_bits(uint32_t bits) {
    add(BPF_JMP | BPF_JSET | BPF_K, bits, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  }
  /// `call` with the rules that `rules` adds for the low half of its argument; what they do not allow is refused.
  template <class Rules>
  void only_with(int call, size_t argument, const Rules& rules) {
    const size_t jump = size_;
    add(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 0);
    load(offsetof(seccomp_data, args) + argument * sizeof(uint64_t));
    rules();
    refuse();
    code_[jump].jf = static_cast<uint8_t>(size_ - jump - 1);
  }

  std::array<sock_filter, 2 * std::size(kAllowed) + 160> code_;
  size_t size_ = 0;
};

int landlock_version() {
  return static_cast<int>(syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION));
}

/// Lets this process write below the working folder only, and reach no other.
bool restrict_writes(int version) {
  constexpr uint64_t kTruncate = uint64_t{1} << 14;  // LANDLOCK_ACCESS_FS_TRUNCATE, newer than some kernels' headers
  uint64_t writes = LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_REMOVE_FILE |
                    LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG |
                    LANDLOCK_ACCESS_FS_MAKE_SOCK | LANDLOCK_ACCESS_FS_MAKE_FIFO | LANDLOCK_ACCESS_FS_MAKE_BLOCK |
                    LANDLOCK_ACCESS_FS_MAKE_SYM;
  if (version >= 2) writes |= LANDLOCK_ACCESS_FS_REFER;
  if (version >= 3) writes |= kTruncate;
  // TCP from version 4 on; signals to and abstract sockets of other processes from version 6 on.
  const struct {
    uint64_t files, network, scoped;
  } handled{writes, version >= 4 ? 3u : 0u, version >= 6 ? 3u : 0u};
  const size_t size = sizeof(uint64_t) * (version >= 6 ? 3 : version >= 4 ? 2 : 1);
  const int rules = static_cast<int>(syscall(SYS_landlock_create_ruleset, &handled, size, 0));
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

/// One of the two interpreters: what it runs, where, and what its descriptors 0, 3 and 4 are.
struct Place {
  const char* python;
  const char* code;
  std::string folder;
  int input, read, write;
};

/// Everything between fork and exec; allocates nothing. Returns only when something could not be set up.
void become(const Place& place, const RunLimits& limits, int landlock) {
  setsid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  constexpr int kAbove = 16;  // of the numbers that are taken below
  const int input = fcntl(place.input, F_DUPFD, kAbove), nothing = open("/dev/null", O_RDWR);
  const int read = fcntl(place.read, F_DUPFD, kAbove), write = fcntl(place.write, F_DUPFD, kAbove);
  if (dup2(input, 0) < 0 || dup2(nothing, 1) < 0 || dup2(nothing, 2) < 0 || dup2(read, 3) < 0 || dup2(write, 4) < 0 ||
      syscall(SYS_close_range, 5, ~0U, 0) != 0 || chdir(place.folder.c_str()) != 0) {
    return;
  }
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
  const char* const arguments[] = {place.python, "-s", "-B", "-X", "utf8", "-c", place.code, nullptr};
  const char* const environment[] = {"PYTHONHASHSEED=0", nullptr};
  execve(place.python, const_cast<char* const*>(arguments), const_cast<char* const*>(environment));
}

pid_t start(const Place& place, const RunLimits& limits) {
  const int landlock = landlock_version();
  const pid_t process = fork();
  if (process < 0) throw std::system_error(errno, std::generic_category(), "can't start a process for a program");
  if (process == 0) {
    become(place, limits, landlock);
    _exit(1);
  }
  return process;
}

/// A descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  ~Descriptor() { close(); }
  int number() const { return number_; }
  void close() {
    if (number_ >= 0) ::close(std::exchange(number_, -1));
  }

 private:
  int number_;
};

std::pair<Descriptor, Descriptor> make_pipe() {
  int ends[2];
  MOESAIC_CHECK(pipe2(ends, O_CLOEXEC) == 0, DataError, "can't make a pipe for a program: {}", std::strerror(errno));
  return {Descriptor(ends[0]), Descriptor(ends[1])};
}

/// A new folder that is removed with all it holds.
class WorkingFolder {
 public:
  explicit WorkingFolder(const std::string& below) : path_(below + "/program_XXXXXX") {
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
  std::string made(const char* name) const {
    const std::string path = path_ + "/" + name;
    MOESAIC_CHECK(mkdir(path.c_str(), 0700) == 0, DataError, "can't make {}: {}", path, std::strerror(errno));
    return path;
  }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream file(path_ + "/" + name, std::ios::binary);
    file << text;
    MOESAIC_CHECK(file.flush(), DataError, "can't write {}/{}", path_, name);
  }
  /// Bytes of all it holds.
  int64_t size() const {
    int64_t bytes = 0;
    std::error_code gone;  // a name may go while this looks
    for (auto entry = fs::recursive_directory_iterator(path_, gone); !gone && entry != fs::end(entry);
         entry.increment(gone)) {
      struct stat found{};
      if (lstat(entry->path().c_str(), &found) == 0) bytes += std::max<int64_t>(4096, found.st_blocks * 512);
    }
    return bytes;
  }

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

/// Waits for the end of `process`, at most `seconds` and as long as `goes_on` says so. False when it is running then.
template <class GoesOn>
bool ended_within(pid_t process, double seconds, const GoesOn& goes_on) {
  const Descriptor handle(static_cast<int>(syscall(SYS_pidfd_open, process, 0)));
  constexpr int kMilliseconds = 50;  // between two looks
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (handle.number() >= 0 && std::chrono::steady_clock::now() < end && goes_on()) {
    pollfd ready{handle.number(), POLLIN, 0};
    if (poll(&ready, 1, kMilliseconds) > 0) return true;
  }
  return false;
}

int status_of(pid_t process) {
  int status = 0;
  while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

/// Removes folders of evaluations that have ended without doing so.
void remove_left_behind(const fs::path& temporary) {
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(temporary, ignored)) {
    const std::string name = entry.path().filename().string();
    const int process = name.starts_with(kFolderName) ? std::atoi(name.c_str() + std::strlen(kFolderName)) : 0;
    if (process > 0 && kill(process, 0) != 0 && errno == ESRCH) fs::remove_all(entry.path(), ignored);
  }
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

/// The folder of all programs, and a process that outlives this one to remove it, however this one ends.
class CodeRunner::Keeper {
 public:
  explicit Keeper(const std::string& python) : path_(fs::temp_directory_path().string() + "/" + kFolderName) {
    remove_left_behind(fs::temp_directory_path());
    path_ += fmt::format("{}_XXXXXX", getpid());
    MOESAIC_CHECK(mkdtemp(path_.data()) != nullptr, DataError, "can't make a folder for programs to run in: {}: {}",
                  path_, std::strerror(errno));
    auto [read, write] = make_pipe();
    process_ = fork();
    if (process_ < 0) throw std::system_error(errno, std::generic_category(), "can't start a process");
    if (process_ == 0) {
      setsid();
      dup2(read.number(), 0);
      syscall(SYS_close_range, 3, ~0U, 0);
      execl(python.c_str(), python.c_str(), "-I", "-S", "-c", kWatch, path_.c_str(), nullptr);
      _exit(1);
    }
    alive_ = std::make_unique<Descriptor>(std::move(write));
  }
  ~Keeper() {
    alive_->close();
    status_of(process_);
  }
  const std::string& path() const { return path_; }

 private:
  // Programs get a signal when this process ends; one of them may still write for a moment.
  static constexpr const char* kWatch = R"(import os, shutil, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
)";

  std::string path_;
  pid_t process_ = -1;
  std::unique_ptr<Descriptor> alive_;  // closed by the kernel at the latest
};

CodeRunner::CodeRunner(const RunLimits& limits)
    : limits_(limits), python_(find_python()), keeper_(std::make_unique<Keeper>(python_)) {
  if (landlock_version() < 1) {
    spdlog::warn("this kernel has no Landlock: the programs that pass@1 runs can write wherever you can");
  }
  MOESAIC_CHECK(run("def two(): return 2", "assert two() == 2") == Verdict::kPassed &&
                    run("", "assert False") == Verdict::kFailed,
                UsageError,
                "{} does not run the simplest program under the limits of pass@1 (seccomp filter, {} MiB of memory)",
                python_, limits_.memory >> 20);
}

CodeRunner::~CodeRunner() = default;

Verdict CodeRunner::run(const std::string& program, const std::string& tests) const {
  static const std::string program_code = std::string(kValuesPy) + std::string(kProgramPy);
  static const std::string tests_code = std::string(kValuesPy) + std::string(kTestsPy);
  const WorkingFolder folder(keeper_->path());
  const std::string program_folder = folder.made("program"), tests_folder = folder.made("tests");
  folder.write("program/program.py", program);
  folder.write("tests.py", tests);
  Descriptor tests_file(open((folder.path() + "/tests.py").c_str(), O_RDONLY | O_CLOEXEC));
  Descriptor nothing(open("/dev/null", O_RDONLY | O_CLOEXEC));
  fs::remove(folder.path() + "/tests.py");  // from here on it has no name

  auto [questions_out, questions_in] = make_pipe();
  auto [answers_out, answers_in] = make_pipe();
  const pid_t program_process = start({python_.c_str(), program_code.c_str(), program_folder, nothing.number(),
                                       questions_out.number(), answers_in.number()},
                                      limits_);
  const pid_t tests_process = start({python_.c_str(), tests_code.c_str(), tests_folder, tests_file.number(),
                                     answers_out.number(), questions_in.number()},
                                    limits_);
  for (Descriptor* end : {&questions_out, &questions_in, &answers_out, &answers_in}) end->close();

  const bool ended =
      ended_within(tests_process, limits_.seconds, [&] { return folder.size() <= limits_.all_files_size; });
  const bool too_large = folder.size() > limits_.all_files_size;
  // They could start no other process, so with them everything is gone.
  if (!ended) kill(tests_process, SIGKILL);
  kill(program_process, SIGKILL);
  const int verdict = status_of(tests_process), status = status_of(program_process);
  if (too_large) return Verdict::kKilled;
  const bool passed = ended && WIFEXITED(verdict) && WEXITSTATUS(verdict) == kPassedStatus;
  if (passed) return Verdict::kPassed;
  for (const int each : {verdict, status}) {
    if (!ended || (WIFSIGNALED(each) && WTERMSIG(each) == SIGXCPU)) return Verdict::kTimedOut;
  }
  return WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL ? Verdict::kKilled : Verdict::kFailed;
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
