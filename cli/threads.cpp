#include "cli/threads.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

namespace moesaic::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// How libgomp waits is fixed when it is loaded. With these two it spins as by default while it manages at most as many
// threads as there are CPUs, and does not spin at all while it manages more.
constexpr const char* kSettings[] = {"OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=300000", "MOESAIC_SPIN_WATCH=1"};

std::string_view name_of(std::string_view setting) { return setting.substr(0, setting.find('=')); }

#ifndef MOESAIC_SANITIZE
/// Runs before the constructors of the libraries, libgomp's among them, and starts the program again with kSettings.
void start_with_settings(int, char** argv, char** environment) {
  std::vector<char*> changed;
  for (char** variable = environment; *variable != nullptr; ++variable) {
    for (const char* setting : kSettings) {
      if (name_of(*variable) == name_of(setting)) return;
    }
    if (*variable == std::string_view("OMP_NUM_THREADS=1")) return;
    changed.push_back(*variable);
  }
  for (const char* setting : kSettings) changed.push_back(const_cast<char*>(setting));
  changed.push_back(nullptr);
  char program[4096] = {};  // the path itself, as the kernel names a process by it
  if (readlink("/proc/self/exe", program, sizeof program - 1) > 0) execve(program, argv, changed.data());
}

[[gnu::section(".preinit_array"), gnu::used]] void (*const kStart)(int, char**, char**) = start_with_settings;
#endif

/// Time that threads of this process were ready to run and another ran in their place, since each began.
nanoseconds kept_from_running() {
  int64_t sum = 0;
  std::error_code gone;  // threads end while we read
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", gone)) {
    int64_t running = 0, waiting = 0;
    if (std::ifstream(task.path() / "schedstat") >> running >> waiting) sum += waiting;
  }
  return nanoseconds(sum);
}

/// Time that others ran on the CPUs of this process, since some moment; the kernel counts it in steps of 10 ms.
nanoseconds others_ran() {
  cpu_set_t ours;
  timespec own{};
  if (sched_getaffinity(0, sizeof ours, &ours) != 0 || clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own) != 0) return {};
  int64_t ticks = 0;
  std::ifstream stat("/proc/stat");
  for (std::string line; std::getline(stat, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t user = 0, nice = 0, system = 0;  // then idle, iowait, ..
    if (!(words >> name >> user >> nice >> system) || !name.starts_with("cpu") || name == "cpu") continue;
    const int cpu = std::stoi(name.substr(3));
    if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &ours)) ticks += user + nice + system;
  }
  return nanoseconds(std::chrono::seconds(ticks)) / sysconf(_SC_CLK_TCK) - std::chrono::seconds(own.tv_sec) -
         nanoseconds(own.tv_nsec);
}

/// Moves threads of this process that are ready on one CPU to CPUs of theirs on which none is. The kernel wakes a
/// thread where it last ran, and on two CPUs does not look for a free one: two that met stay together.
void take_apart() {
  struct Ready {
    pid_t thread;
    int cpu;
    cpu_set_t allowed;
  };
  std::vector<Ready> ready;
  std::set<int> taken;
  std::error_code gone;  // threads end while we read
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", gone)) {
    std::string line;
    std::getline(std::ifstream(task.path() / "stat"), line);
    std::istringstream words(line.substr(std::min(line.size(), line.rfind(')') + 1)));  // behind the name
    const std::vector<std::string> fields{std::istream_iterator<std::string>(words), {}};
    constexpr size_t kState = 0, kProcessor = 36;
    Ready found{std::stoi(task.path().filename().string()), 0, {}};
    if (fields.size() <= kProcessor || fields[kState] != "R" || found.thread == gettid() ||
        sched_getaffinity(found.thread, sizeof found.allowed, &found.allowed) != 0) {
      continue;
    }
    found.cpu = std::stoi(fields[kProcessor]);
    if (taken.insert(found.cpu).second) continue;  // the first there stays
    ready.push_back(found);
  }
  for (const Ready& each : ready) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &each.allowed) || taken.contains(cpu)) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      if (sched_setaffinity(each.thread, sizeof one, &one) != 0) break;
      sched_setaffinity(each.thread, sizeof each.allowed, &each.allowed);
      taken.insert(cpu);
      break;
    }
  }
}

void watch(std::stop_token stop, void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  constexpr milliseconds kWindow(50), kBusy(5), kShortest(500), kLongest(8000);
  std::mutex mutex;
  std::condition_variable_any stopped;
  auto sleep = [&](milliseconds time) {
    std::unique_lock lock(mutex);
    stopped.wait_for(lock, stop, time, [] { return false; });
  };

  // Whether others took a fifth of a CPU.
  auto sleep_beside_others = [&](milliseconds time) {
    const nanoseconds before = others_ran();
    sleep(time);
    return others_ran() - before > time / 5;
  };
  milliseconds pause = kShortest, spinning(0);
  while (!stop.stop_requested()) {
    const nanoseconds before = kept_from_running();
    const bool others = sleep_beside_others(kWindow), kept = kept_from_running() - before > kBusy;
    if (kept && !others) take_apart();
    if (!kept || !others) {
      spinning += kWindow;
      if (spinning > pause) pause = kShortest;
      continue;
    }
    // A team that sleeps makes libgomp manage more threads than there are CPUs, until the thread that owns it ends.
    std::thread([&] {
      gomp_parallel([](void*) {}, nullptr, std::thread::hardware_concurrency() + 1, 0);
      for (milliseconds slept(0); slept < pause && !stop.stop_requested(); slept += kShortest) {
        if (!sleep_beside_others(kShortest)) break;
      }
    }).join();
    pause = std::min(2 * pause, kLongest);
    spinning = milliseconds(0);
  }
}

}  // namespace

SpinWatch::SpinWatch() {
  const char* mark = "MOESAIC_SPIN_WATCH";
  if (std::getenv(mark) == nullptr) return;
  for (const char* setting : kSettings) unsetenv(std::string(name_of(setting)).c_str());  // programs we start choose
  auto gomp_parallel =
      reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (gomp_parallel != nullptr && at::get_num_threads() > 1) thread_ = std::jthread(watch, gomp_parallel);
}

void bound_product_caches() {
  // The products of one micro-batch, forward and backward, are 40 to 64; less and each is compiled anew.
  setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96", /*overwrite=*/0);
  setenv("LRU_CACHE_CAPACITY", "8", /*overwrite=*/0);
}

void ask_for_huge_pages() { setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0); }

}  // namespace moesaic::cli
