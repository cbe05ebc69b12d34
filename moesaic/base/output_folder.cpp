#include "moesaic/base/output_folder.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <ctime>
#include <utility>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/base/json.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMark = ".moesaic-", kEnding = ".tmp";

/// The process that writes a file of this name; 0 when temporary_name() didn't give it.
pid_t writer_of(const std::string& name) {
  const size_t mark = name.rfind(kMark);
  if (mark == std::string::npos || !name.ends_with(kEnding)) return 0;
  const char *begin = name.data() + mark + kMark.size(), *end = name.data() + name.size() - kEnding.size();
  pid_t process = 0;
  const auto [stop, error] = std::from_chars(begin, end, process);
  return error == std::errc() && stop == end && process > 0 ? process : 0;
}

bool is_work(const fs::path& path) {
  static const std::array kNames{"config.json",
                                 "adapter_config.json",
                                 "calm_config.json",
                                 "generation_config.json",
                                 "tokenizer.json",
                                 "tokenizer_config.json",
                                 "tokenizer.model",
                                 "trainer_state.json",
                                 "run.yaml",
                                 "train_log.jsonl",
                                 "router_stats.jsonl",
                                 "README.md",
                                 "chat_template.jinja",
                                 "report.json",
                                 "report.html"};
  static const std::array kEndings{".safetensors", ".gguf", ".bin", ".pt", ".pth"};
  const std::string name = path.filename().string();
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end() ||
         std::find(kEndings.begin(), kEndings.end(), path.extension()) != kEndings.end() ||
         name.starts_with("checkpoint-");
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  std::tm local{};
  localtime_r(&time, &local);
  std::array<char, 64> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S", &local);
  return text.data();
}

std::string host() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

/// The first bytes of an open file, without line ends.
std::string head_of(int descriptor) {
  std::array<char, 400> bytes{};
  const ssize_t size = ::pread(descriptor, bytes.data(), bytes.size(), 0);
  std::string text(bytes.data(), static_cast<size_t>(std::max<ssize_t>(0, size)));
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, ' ');
  return text.substr(0, text.find_last_not_of(' ') + 1);
}

}  // namespace

std::string temporary_name(const fs::path& path) {
  return fmt::format("{}{}{}{}", path.string(), kMark, ::getpid(), kEnding);
}

void remove_dead_temporaries(const fs::path& dir) {
  constexpr int kDepth = 2;
  std::error_code error;
  std::vector<fs::path> dead;
  for (auto it = fs::recursive_directory_iterator(dir, fs::directory_options::skip_permission_denied, error);
       !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    if (it.depth() >= kDepth) it.disable_recursion_pending();
    const pid_t process = writer_of(it->path().filename().string());
    if (process > 0 && it->is_regular_file(error) && ::kill(process, 0) != 0 && errno == ESRCH) {
      dead.push_back(it->path());
    }
  }
  for (const fs::path& file : dead) fs::remove(file, error);
}

std::string found_work(const fs::path& dir) {
  std::error_code error;
  std::vector<std::string> found;
  for (auto it = fs::directory_iterator(dir, error); !error && it != fs::directory_iterator(); it.increment(error)) {
    if (is_work(it->path())) found.push_back(it->path().filename().string());
  }
  return found.empty() ? "" : *std::min_element(found.begin(), found.end());
}

void check_writable(const fs::path& dir, const std::string& what) {
  std::error_code error;
  fs::path nearest = fs::absolute(dir).lexically_normal();
  while (!fs::exists(nearest, error) && nearest.has_relative_path()) nearest = nearest.parent_path();
  MOESAIC_CHECK(fs::is_directory(nearest, error), UsageError, "{} {}: got {}, which is a file, expected a folder", what,
                dir.string(), nearest.string());
  MOESAIC_CHECK(::access(nearest.c_str(), W_OK | X_OK) == 0, UsageError, "{} {}: {} can't be written: {}", what,
                dir.string(), nearest.string(), std::strerror(errno));
}

void check_not_an_input(const fs::path& dir, const std::vector<fs::path>& inputs) {
  std::error_code error;
  for (const fs::path& input : inputs) {
    if (input.empty() || !fs::exists(input, error)) continue;
    const fs::path folder = fs::is_directory(input, error) ? input
                            : input.has_parent_path()      ? input.parent_path()
                                                           : fs::path(".");
    MOESAIC_CHECK(!fs::equivalent(dir, folder, error), UsageError,
                  "{}: got the folder that {} is read from, expected another one to write", dir.string(),
                  input.string());
  }
}

void check_new_folder(const fs::path& dir, const std::vector<fs::path>& inputs) {
  std::error_code error;
  MOESAIC_CHECK(!fs::exists(dir, error) || fs::is_directory(dir, error), UsageError,
                "{}: got a file, expected a folder to write", dir.string());
  check_not_an_input(dir, inputs);
  remove_dead_temporaries(dir);
  const std::string found = found_work(dir);
  MOESAIC_CHECK(found.empty(), UsageError,
                "{}: got a folder that holds {}, expected a new or empty one: nothing is overwritten", dir.string(),
                found);
}

void write_new_file(const fs::path& path, std::string_view bytes) {
  std::error_code error;
  if (!fs::exists(path, error)) return write_file_atomically(path, bytes);
  MOESAIC_CHECK(fs::is_regular_file(path, error) && read_file(path) == bytes, UsageError,
                "{}: got something else that stands there, expected no such file: nothing is overwritten",
                path.string());
}

FolderLock::FolderLock(const fs::path& dir) : dir_(dir), file_(dir / "run.lock") {
  for (fs::path part = dir; !part.empty() && !fs::exists(part); part = part.parent_path()) {
    made_.insert(made_.begin(), part);
  }
  fs::create_directories(dir);
  while (true) {
    descriptor_ = ::open(file_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    MOESAIC_CHECK(descriptor_ >= 0, DataError, "{}: can't be made: {}", file_.string(), refusal(errno));
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
      const int reason = errno;
      const std::string holder = head_of(descriptor_);
      ::close(std::exchange(descriptor_, -1));
      MOESAIC_CHECK(reason == EWOULDBLOCK, DataError, "{}: can't be locked: {}", file_.string(), refusal(reason));
      throw UsageError(fmt::format("output_dir {}: a run is at work there ({}); nothing was touched", dir.string(),
                                   holder.empty() ? "it has just begun" : holder));
    }
    // The one before may have removed the file between our opening and locking it.
    struct stat ours{}, named{};
    if (::fstat(descriptor_, &ours) == 0 && ::stat(file_.c_str(), &named) == 0 && ours.st_ino == named.st_ino &&
        ours.st_dev == named.st_dev) {
      break;
    }
    ::close(std::exchange(descriptor_, -1));
  }
  const std::string text = fmt::format("host {}, process {}, since {}\n", host(), ::getpid(), now());
  if (::ftruncate(descriptor_, 0) != 0 || ::pwrite(descriptor_, text.data(), text.size(), 0) < 0) {
    // A full disk: the lock holds all the same, it says less.
  }
}

FolderLock::~FolderLock() {
  ::unlink(file_.c_str());
  ::close(descriptor_);
  for (auto it = made_.rbegin(); it != made_.rend(); ++it) {
    if (::rmdir(it->c_str()) != 0) break;
  }
}

}  // namespace moesaic
