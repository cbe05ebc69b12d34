#include "moesaic/eval/code_runner.h"

#include <gtest/gtest.h>
#include <linux/landlock.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "moesaic/base/json.h"
#include "moesaic/eval/task.h"

namespace moesaic::eval {
namespace {
namespace fs = std::filesystem;

Verdict run(const std::string& program, const std::string& tests = "") {
  static const CodeRunner runner({.cpu_seconds = 2, .seconds = 5, .memory = int64_t{512} << 20});
  return runner.run(program, tests);
}

/// A program that passes when `statement` is refused.
std::string refused(const std::string& statement) {
  return "import ctypes, fcntl, os, resource, signal, socket, struct, sys\ntry:\n    " + statement +
         "\nexcept OSError as error:\n    assert error.errno in (1, 13), error\nelse:\n    raise SystemExit(1)\n";
}

bool has_landlock() { return syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION) >= 1; }

TEST(CodeRunner, PassesWhatRunsToItsEnd) {
  EXPECT_EQ(run("import math, typing, collections\nassert math.gcd(6, 9) == 3"), Verdict::kPassed);
  EXPECT_EQ(run(""), Verdict::kPassed);
  EXPECT_EQ(run("print('x' * 1000000)\nassert input is not None"), Verdict::kPassed);
  EXPECT_EQ(run("if __name__ == '__main__':\n    raise SystemExit(1)"), Verdict::kPassed);  // as a module is tested
}

TEST(CodeRunner, FailsWhatRaises) {
  EXPECT_EQ(run("assert 1 == 2"), Verdict::kFailed);
  EXPECT_EQ(run("def broken(:\n"), Verdict::kFailed);
  EXPECT_EQ(run("\xFF\xFE"), Verdict::kFailed);
  EXPECT_EQ(run(std::string("x = 1\0", 6)), Verdict::kFailed);
  EXPECT_EQ(run("input()"), Verdict::kFailed);  // no standard input
}

TEST(CodeRunner, LeavingEarlyIsNoPass) {
  EXPECT_EQ(run("import sys\nsys.exit(0)\nassert False"), Verdict::kFailed);
  EXPECT_EQ(run("import os\nos._exit(0)"), Verdict::kFailed);
}

TEST(CodeRunner, StopsEndlessPrograms) {
  EXPECT_EQ(run("while True: pass"), Verdict::kTimedOut);  // by its CPU time
  const CodeRunner hurried({.cpu_seconds = 2, .seconds = 1});
  EXPECT_EQ(hurried.run("import time\ntime.sleep(600)", ""), Verdict::kTimedOut);
  EXPECT_EQ(hurried.run("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)", ""),
            Verdict::kTimedOut);
}

TEST(CodeRunner, BoundsMemoryAndFiles) {
  EXPECT_EQ(run("x = bytearray(2 << 30)"), Verdict::kFailed);
  EXPECT_EQ(run("x = []\nwhile True: x.append(bytearray(1 << 20))"), Verdict::kFailed);
  EXPECT_EQ(run("file = open('big', 'wb')\nwhile True: file.write(bytes(1 << 20)); file.flush()"), Verdict::kFailed);
}

TEST(CodeRunner, TellsDeathBySignal) {
  EXPECT_EQ(run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"), Verdict::kKilled);
}

TEST(CodeRunner, StartsNoProcess) {
  EXPECT_EQ(run(refused("os.fork()")), Verdict::kPassed);
  EXPECT_EQ(run(refused("os.system('true') == 0 or os.posix_spawn('/bin/true', ['true'], {})")), Verdict::kPassed);
  EXPECT_EQ(run("import os\nfor i in range(5): os.fork()"), Verdict::kFailed);
  EXPECT_EQ(run("import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)"), Verdict::kFailed);
}

TEST(CodeRunner, LeavesNothingBehind) {
  // a thread that never ends must neither hold up the end nor outlive it
  EXPECT_EQ(run("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"), Verdict::kPassed);
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), 0) << "the process that keeps the folder runs, and none has ended";
  std::ifstream children("/proc/thread-self/children");
  EXPECT_EQ(std::distance(std::istream_iterator<int>(children), {}), 1);
  for (const fs::directory_entry& entry : fs::directory_iterator(fs::temp_directory_path())) {
    // the folder of this test's one runner, and nothing in it
    if (!entry.path().filename().string().starts_with(fmt::format("moesaic_programs_{}_", getpid()))) continue;
    EXPECT_TRUE(fs::is_empty(entry.path())) << entry.path();
  }
}

TEST(CodeRunner, TheFolderGoesHoweverTheEvaluationEnds) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t evaluation = fork();
  if (evaluation == 0) {
    const CodeRunner runner;
    const char ready = 'r';
    if (write(ends[1], &ready, 1) != 1) _exit(1);
    runner.run("import time\nopen('left', 'w').write('x')\ntime.sleep(600)", "");
    _exit(1);
  }
  char ready = 0;
  ASSERT_EQ(read(ends[0], &ready, 1), 1);
  const auto folders = [&] {
    int found = 0;
    for (const fs::directory_entry& entry : fs::directory_iterator(fs::temp_directory_path())) {
      found += entry.path().filename().string().starts_with(fmt::format("moesaic_programs_{}_", evaluation));
    }
    return found;
  };
  EXPECT_EQ(folders(), 1);
  kill(evaluation, SIGKILL);
  waitpid(evaluation, nullptr, 0);
  for (int tries = 0; tries < 100 && folders() > 0; ++tries) usleep(100'000);
  EXPECT_EQ(folders(), 0);
}

TEST(CodeRunner, TestsAreAskedAcross) {
  const std::string program = R"(import math, collections, functools
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def __eq__(self, other): return self.a == other.a and self.b == other.b
    def __lt__(self, other): return self.a < other.a
def swapped(pair): return Pair(pair.b, pair.a)
def sort(values): values.sort()
def tally(text): return collections.Counter(text)
def apply(f, values): return [f(each) for each in values]
def numbers():
    for i in range(3): yield i
def fails(): raise KeyError("gone")
total = 7
)";
  for (const char* test : {"assert swapped(Pair(1, 2)) == Pair(2, 1)", "assert swapped(Pair(1, 2)).a == 2",
                           "assert Pair(1, 2) < Pair(2, 0)", "v = [3, 1, 2]\nsort(v)\nassert v == [1, 2, 3]",
                           "assert tally('aab') == {'a': 2, 'b': 1}", "assert apply(lambda x: x + 1, (1, 2)) == [2, 3]",
                           "assert list(numbers()) == [0, 1, 2]", "assert total == 7",
                           "assert math.isclose(math.pi, 3.14159265, rel_tol=1e-6)",
                           "p = Pair(1, 2)\np.a = 5\nassert p.a == 5", "def check(f): assert f('') == {}\ncheck(tally)",
                           "try:\n    fails()\n    assert False\nexcept KeyError: pass"}) {
    EXPECT_EQ(run(program, test), Verdict::kPassed) << test;
  }
  EXPECT_EQ(run(program, "assert total == 8"), Verdict::kFailed);
  EXPECT_EQ(run(program, "assert missing"), Verdict::kFailed);
}

TEST(CodeRunner, APassIsTheWordOfTheTests) {
  const std::string test = "assert f(2) == 4";
  EXPECT_EQ(run("def f(x): return x * x", test), Verdict::kPassed);
  for (const char* program :
       {"import os\ndef f(x): os._exit(42)", "import os\nos._exit(42)",
        "import os\nreal = os._exit\nos._exit = lambda status: real(42)\ndef f(x): return 5",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import os; os._exit(42)'])",
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "import os\nfor fd in range(5, 64):\n    try: os.write(fd, b'42')\n    except OSError: pass\ndef f(x): return "
        "5",
        "import os\nos.write(4, b'[\"f\"]\\n{\"value\": null, \"changed\": {}}\\n')\nos._exit(0)",
        "import sys\nsys.settrace(lambda *a: None)\ndef f(x): raise SystemExit(0)",
        "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\ndef f(x): return 5"}) {
    EXPECT_EQ(run(program, test), Verdict::kFailed) << program;
  }
}

TEST(CodeRunner, BoundsAllFilesTogether) {
  const CodeRunner runner({.cpu_seconds = 20, .seconds = 20, .all_files_size = int64_t{1} << 22});
  EXPECT_EQ(runner.run("open('small', 'wb').write(bytes(1 << 20))", ""), Verdict::kPassed);
  EXPECT_EQ(runner.run("for i in range(10**9): open(str(i), 'wb').write(bytes(1 << 20))", ""), Verdict::kKilled);
  // Also what is gone again when the program ends.
  EXPECT_EQ(runner.run("import os, time\nfor i in range(8): open(str(i), 'wb').write(bytes(1 << 20))\ntime.sleep(5)\n"
                       "for i in range(8): os.remove(str(i))",
                       ""),
            Verdict::kKilled);
  EXPECT_EQ(runner.run("for i in range(10**9): open(str(i), 'wb')", ""), Verdict::kKilled);
}

TEST(CodeRunner, ChangesNoModesOrFlags) {
  const std::string numbers = "import ctypes\nsyscall = ctypes.CDLL(None, use_errno=True).syscall\n";
  for (const char* call : {"452, -100, b'program.py', 0, 0", "463, -100, b'program.py', 0, 0, 0, 0",
                           "469, -100, b'program.py', 0, 0, 0", "319, b'x', 0", "425, 1, 0"}) {
    EXPECT_EQ(run(numbers + fmt::format("assert syscall({}) == -1 and ctypes.get_errno() == 1", call)),
              Verdict::kPassed)
        << call;
  }
  EXPECT_EQ(run(refused("fcntl.ioctl(os.open('.', os.O_RDONLY), 0x40086602, bytes(8))")), Verdict::kPassed);
}

TEST(CodeRunner, HasNoNetwork) {
  EXPECT_EQ(run(refused("socket.socket()")), Verdict::kPassed);
  EXPECT_EQ(run(refused("socket.socket(socket.AF_UNIX)")), Verdict::kPassed);
  EXPECT_EQ(run(refused("socket.socketpair()")), Verdict::kPassed);
  EXPECT_EQ(run("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')"), Verdict::kFailed);
}

TEST(CodeRunner, TouchesNoOtherProcess) {
  EXPECT_EQ(run(refused("os.kill(os.getppid(), 0)")), Verdict::kPassed);
  EXPECT_EQ(run(refused("os.kill(0, signal.SIGTERM)")), Verdict::kPassed);
  EXPECT_EQ(run(refused("resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)")), Verdict::kPassed);
  EXPECT_EQ(run("import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ"), Verdict::kPassed);
  // standard streams, the two pipes to the tests, and the one that lists them
  EXPECT_EQ(run("import os\nassert len(os.listdir('/proc/self/fd')) == 6"), Verdict::kPassed);
  // a signal for whoever owns a pipe
  EXPECT_EQ(run(refused("fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())")), Verdict::kPassed);
  EXPECT_EQ(run(refused("fcntl.fcntl(0, 15, struct.pack('ii', 1, os.getppid()))")), Verdict::kPassed);
  EXPECT_EQ(run(refused("fcntl.fcntl(0, 10, signal.SIGKILL)")), Verdict::kPassed);
  EXPECT_EQ(run(refused("fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)")), Verdict::kPassed);
  EXPECT_EQ(run(refused("fcntl.ioctl(0, 0x8901, struct.pack('i', os.getppid()))")), Verdict::kPassed);
}

TEST(CodeRunner, WritesInItsOwnFolderAlone) {
  EXPECT_EQ(run("open('a', 'w').write('x')\nimport os\nos.mkdir('d')\nos.rename('a', 'd/a')\nos.remove('d/a')"),
            Verdict::kPassed);
  const fs::path outside = fs::temp_directory_path() / fmt::format("moesaic_outside_{}", getpid());
  std::ofstream(outside) << "kept";
  EXPECT_EQ(run(refused(fmt::format("os.chmod('{}', 0)", outside.string()))), Verdict::kPassed);
  if (!has_landlock()) {
    fs::remove(outside);
    GTEST_SKIP() << "this kernel has no Landlock, so writes outside are not refused";
  }
  for (const char* statement : {"open('{}', 'w')", "open('{}', 'a')", "os.remove('{}')", "os.truncate('{}', 0)",
                                "os.symlink('x', '{}2')", "os.mkdir('{}2')", "os.rename('program.py', '{}2')"}) {
    std::string filled = statement;
    filled.replace(filled.find("{}"), 2, outside.string());
    if (filled.starts_with("os.rename")) {  // EXDEV, what Landlock answers to a move out of the folder
      EXPECT_EQ(run("import os\n" + filled), Verdict::kFailed) << filled;
    } else {
      EXPECT_EQ(run(refused(filled)), Verdict::kPassed) << filled;
    }
  }
  EXPECT_EQ(read_file(outside), "kept");
  EXPECT_FALSE(fs::exists(outside.string() + "2"));
  fs::remove(outside);
}

TEST(CodeRunner, TheOrderOfSetsIsFixed) {
  const std::string order = "text = ''.join({'red', 'green', 'blue', 'white', 'black', 'pink'})\n";
  const Verdict first = run(order + "assert text < 'c'");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(order + "assert text < 'c'"), first);
}

TEST(CodeIn, TakesTheFencedBlock) {
  EXPECT_EQ(code_in("    return x\n"), "    return x\n");
  EXPECT_EQ(code_in("Here it is:\n```python\ndef f():\n    return 1\n```\nIt returns 1."), "def f():\n    return 1\n");
  EXPECT_EQ(code_in("```\nx = 1\n```"), "x = 1\n");
  EXPECT_EQ(code_in("```py\nx = 1\n"), "x = 1\n");  // cut short
  EXPECT_EQ(code_in("```"), "");
  EXPECT_EQ(code_in("Sure: ```python\n```"), "");
}

TEST(CodeIn, AFenceBehindBareCodeEndsIt) {
  EXPECT_EQ(code_in("    return x\n```\n\nExample:\n```\nf(1)\n```"), "    return x\n");
  EXPECT_EQ(code_in("def f():\n    return 1\n```\n"), "def f():\n    return 1\n");
}

TEST(SharedData, CanonicalSolutionsPass) {
  const char* given = std::getenv("MOESAIC_DATA_DIR");
  const fs::path data = given ? fs::path(given) : fs::path(MOESAIC_SOURCE_DIR) / "../shared/data";
  if (!fs::exists(data / "humaneval")) GTEST_SKIP() << "no data set folder at " << data;
  const CodeRunner runner;
  // Every seventh of HumanEval and fiftieth of MBPP; MOESAIC_ALL_PROGRAMS=1 runs all.
  const bool all = std::getenv("MOESAIC_ALL_PROGRAMS") != nullptr;
  for (const Task& task : load_tasks({(data / "humaneval").string(), (data / "mbpp").string()}, {})) {
    const size_t step = all ? 1 : task.name == "mbpp" ? 50 : 7;
    for (size_t i = 0; i < task.items.size(); i += step) {
      const Item& item = task.items[i];
      const Verdict verdict = runner.run(item.program->before + item.targets[0], item.program->tests);
      EXPECT_EQ(verdict, Verdict::kPassed) << task.name << " " << item.doc["task_id"] << " " << name_of(verdict);
      const std::string nothing = task.name == "mbpp" ? "pass\n" : "    pass\n";
      EXPECT_EQ(runner.run(item.program->before + nothing, item.program->tests), Verdict::kFailed)
          << item.doc["task_id"];
    }
  }
}

}  // namespace
}  // namespace moesaic::eval
