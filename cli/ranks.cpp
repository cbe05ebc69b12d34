#include "cli/ranks.h"

#include <ATen/Parallel.h>
#include <sched.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

#include "cli/streams.h"
#include "moesaic/base/check.h"
#include "moesaic/base/device.h"
#include "moesaic/base/log.h"
#include "moesaic/ranks/group.h"

extern char** environ;  // NOLINT(readability-redundant-declaration)

namespace moesaic::cli {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr const char* kLaunched = "MOESAIC_LAUNCHED";  // by us, who tell which rank failed
constexpr seconds kGrace(10);                          // until a rank that was asked to end is killed
constexpr int kForwarded[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};

/// The cores that a rank has for itself: its share of this machine's, or those that its launcher bound it to.
int own_cores(const ranks::Place& place) {
  cpu_set_t ours;
  const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const int allowed = sched_getaffinity(0, sizeof ours, &ours) == 0 ? CPU_COUNT(&ours) : online;
  const bool bound = !place.hosted && allowed < online;
  return bound ? allowed : std::max<int>(1, allowed / static_cast<int>(place.local_size));
}

std::vector<char*> pointers(std::vector<std::string>& words) {
  std::vector<char*> result;
  for (std::string& word : words) result.push_back(word.data());
  result.push_back(nullptr);
  return result;
}

struct Child {
  pid_t process;
  bool running = true;
  int status = 0;  // as waitpid has it

  int exit_code() const { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }
  /// asked_to_end: by a signal that we passed on, which may have met it before it listened or after it had saved.
  bool failed(bool asked_to_end) const {
    const bool obeyed =
        asked_to_end && WIFSIGNALED(status) &&
        std::find(std::begin(kForwarded), std::end(kForwarded), WTERMSIG(status)) != std::end(kForwarded);
    return !running && !obeyed && exit_code() != 0 && exit_code() != static_cast<int>(ExitCode::kInterrupted);
  }
};

Child start(std::vector<std::string>& arguments, int64_t rank, int64_t size, int64_t port, int64_t restart) {
  std::vector<std::string> environment{
      fmt::format("RANK={}", rank),
      fmt::format("WORLD_SIZE={}", size),
      fmt::format("LOCAL_RANK={}", rank),
      fmt::format("LOCAL_WORLD_SIZE={}", size),
      "MASTER_ADDR=127.0.0.1",
      fmt::format("MASTER_PORT={}", port),
      "TORCHELASTIC_USE_AGENT_STORE=True",
      fmt::format("TORCHELASTIC_RESTART_COUNT={}", restart),
      fmt::format("{}=1", kLaunched),
  };
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string name(*variable, std::string(*variable).find('='));
    const bool ours = std::any_of(environment.begin(), environment.end(),
                                  [&](const std::string& own) { return own.starts_with(name + "="); });
    if (!ours) environment.emplace_back(*variable);
  }
  const std::vector<char*> words = pointers(arguments), variables = pointers(environment);
  sigset_t none;
  sigemptyset(&none);
  const pid_t parent = getpid();
  const pid_t process = fork();
  MOESAIC_CHECK(process >= 0, DataError, "can't start a process: {}", std::strerror(errno));
  if (process > 0) return {process};
  // Until the program begins anew, only calls that are safe beside the threads that are gone.
  setpgid(0, 0);  // the terminal's signals come through us
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execve("/proc/self/exe", words.data(), variables.data());
  _exit(127);
}

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> arguments;
  for (std::string word; std::getline(file, word, '\0');) arguments.push_back(word);
  return arguments;
}

/// Runs the ranks once, to their ends. Returns the first that failed, or -1; asked_to_end becomes whether we were.
int64_t run_once(std::vector<Child>& children, const sigset_t& signals, bool& asked_to_end) {
  int64_t failed = -1;
  steady_clock::time_point until;
  auto send = [&](int signal) {
    for (const Child& child : children) {
      if (child.running) kill(child.process, signal);
    }
  };
  while (std::any_of(children.begin(), children.end(), [](const Child& child) { return child.running; })) {
    const timespec moment{0, 100'000'000};
    const int signal = sigtimedwait(&signals, nullptr, &moment);
    if (signal > 0 && signal != SIGCHLD) {
      // The first as SIGUSR1: who signals all processes of a group reaches the ranks, too, and a second SIGTERM is an
      // end at once.
      send(asked_to_end ? signal : SIGUSR1);
      asked_to_end = true;
    }
    for (size_t rank = 0; rank < children.size(); ++rank) {
      Child& child = children[rank];
      if (!child.running || waitpid(child.process, &child.status, WNOHANG) != child.process) continue;
      child.running = false;
      if (failed >= 0 || !child.failed(asked_to_end)) continue;
      failed = static_cast<int64_t>(rank);
      until = steady_clock::now() + kGrace;
      send(SIGTERM);
      send(SIGCONT);  // one that stands still hears of it, too
    }
    if (failed >= 0 && steady_clock::now() > until) send(SIGKILL);
  }
  return failed;
}

}  // namespace

int launch(int64_t ranks, int64_t restarts) {
  std::vector<std::string> arguments = own_arguments();
  sigset_t signals, before;
  sigemptyset(&signals);
  sigaddset(&signals, SIGCHLD);
  for (const int signal : kForwarded) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, &before);
  const ranks::Host host;
  int code = 0;
  bool asked_to_end = false;
  for (int64_t restart = 0;; ++restart) {
    std::vector<Child> children;
    for (int64_t rank = 0; rank < ranks; ++rank)
      children.push_back(start(arguments, rank, ranks, host.port(), restart));
    const int64_t failed = run_once(children, signals, asked_to_end);
    if (failed < 0) {
      const bool done =
          std::all_of(children.begin(), children.end(), [](const Child& child) { return child.exit_code() == 0; });
      code = done ? 0 : static_cast<int>(ExitCode::kInterrupted);
      break;
    }
    const Child& child = children[failed];
    code = child.exit_code();
    say_error("rank {} {}; the other ranks were ended\n", failed,
              WIFSIGNALED(child.status) ? fmt::format("was ended by signal {} ({})", WTERMSIG(child.status),
                                                      strsignal(WTERMSIG(child.status)))
                                        : fmt::format("ended with exit code {}", code));
    if (restart >= restarts || asked_to_end || code == static_cast<int>(ExitCode::kUsage)) break;
    say_error("starting the {} ranks again, {} of {} times\n", ranks, restart + 1, restarts);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return code;
}

void add_ranks_option(CLI::App& app, int64_t& ranks, const std::string& help) {
  app.add_option("--ranks", ranks, help)->check(CLI::Range(1, 1024));
}

ranks::Place own_place(int64_t asked) {
  const ranks::Place place =
      ranks::place_from([](const char* name) { return std::getenv(name); }).value_or(ranks::Place{});
  MOESAIC_CHECK(place.size == 1 || asked == 0 || asked == place.size, UsageError,
                "--ranks {}: got {} ranks from the launcher that started this one, expected one of the two", asked,
                place.size);
  return place;
}

std::string device_of(const ranks::Place& place, const std::string& device) {
  if (place.size == 1 || (device != "auto" && device != "cuda") || !load_cuda()) return device;
  return fmt::format("cuda:{}", place.local_rank);
}

void settle_down(const ranks::Place& place, int threads) {
  if (place.size == 1) return;
  const int share = own_cores(place);
  if (threads == 0 && std::getenv("OMP_NUM_THREADS") == nullptr) set_threads(share);
  if (place.rank == 0) {
    if (at::get_num_threads() > share) {
      spdlog::warn("{} threads a rank, of which {} have a core: they wait for each other\nhint: --threads {}",
                   at::get_num_threads(), share, share);
    }
    return;
  }
  MOESAIC_CHECK(std::freopen("/dev/null", "w", stdout) != nullptr, DataError, "/dev/null can't be opened");
  spdlog::set_level(std::max(spdlog::get_level(), spdlog::level::warn));
  mark_log(fmt::format("[rank {}] ", place.rank));
}

int told_once(const ranks::Place& place, const std::function<int()>& work) {
  if (place.rank == 0) return work();
  try {
    return work();
  } catch (const ranks::Lost& error) {
    if (std::getenv(kLaunched) == nullptr) throw;
    return static_cast<int>(error.exit_code());
  } catch (const Error& error) {
    if (std::getenv(kLaunched) != nullptr) std::this_thread::sleep_for(seconds(1));
    throw Error(error.exit_code(), fmt::format("rank {}: {}", place.rank, error.what()));
  }
}

}  // namespace moesaic::cli
