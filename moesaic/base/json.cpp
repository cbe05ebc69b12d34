#include "moesaic/base/json.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <numeric>

#include "moesaic/base/file_errors.h"
#include "moesaic/base/output_folder.h"

namespace moesaic {
namespace {

constexpr int kMaxDepth = 200;

/// Refuses text nested deeper than kMaxDepth before a parser or a recursive visitor sees it.
void check_depth(std::string_view text, const std::string& where) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      MOESAIC_CHECK(++depth <= kMaxDepth, FormatError, "{}: JSON is nested deeper than {} levels (byte {})", where,
                    kMaxDepth, i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

template <class AnyJson>
AnyJson parse(std::string_view text, const std::string& where) {
  check_depth(text, where);
  try {
    return AnyJson::parse(text);
  } catch (const nlohmann::json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 3: ..." without the bracket.
    const std::string_view said = error.what();
    const bool cut = said.find("unexpected end of input") != std::string_view::npos ||
                     said.find("missing closing quote") != std::string_view::npos;
    MOESAIC_CHECK(!cut, FormatError, "{}: not valid JSON: {}", where, ends_early(text.size()));
    std::string message = error.what();
    if (auto end = message.find("] "); end != std::string::npos) message.erase(0, end + 2);
    if (message.size() > 300) message = message.substr(0, 300) + "...";
    throw FormatError(fmt::format("{}: not valid JSON: {}", where, message));
  }
}

/// `text` with null for the bare words NaN, Infinity and -Infinity.
std::string without_non_numbers(std::string_view text) {
  std::string out;
  bool in_string = false;
  for (size_t i = 0; i < text.size();) {
    if (!in_string) {
      size_t length = 0;
      for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
        if (text.substr(i).starts_with(word)) length = word.size();
      }
      if (length > 0) {
        out += "null";
        i += length;
        continue;
      }
    } else if (text[i] == '\\' && i + 1 < text.size()) {
      out += text[i++];
      out += text[i++];
      continue;
    }
    in_string = in_string != (text[i] == '"');
    out += text[i++];
  }
  return out;
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

/// Edit distance of `a` and `b`: insertions, deletions, substitutions and swaps of neighbours cost 1.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<size_t>> cost(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) cost[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) cost[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      size_t substitution = cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, substitution});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
      }
    }
  }
  return cost[a.size()][b.size()];
}

/// A name as typos see it: small letters, one kind of dash, and none of a flag in front.
std::string letters_of(std::string_view name) {
  constexpr size_t kLongest = 200;
  name.remove_prefix(std::min(name.find_first_not_of('-'), name.size()));
  std::string out(name.substr(0, kLongest));
  for (char& c : out) c = c == '-' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) { return parse<Json>(text, where); }

OrderedJson parse_ordered_json(std::string_view text, const std::string& where) {
  if (text.find("NaN") == std::string_view::npos && text.find("Infinity") == std::string_view::npos) {
    return parse<OrderedJson>(text, where);
  }
  return parse<OrderedJson>(without_non_numbers(text), where);
}

Json read_json(const std::filesystem::path& path, size_t max_bytes) {
  return parse_json(read_file(path, max_bytes), path.string());
}

std::string read_file(const std::filesystem::path& path, size_t max_bytes) {
  // A pipe that nobody writes to is empty, not waited for.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  MOESAIC_CHECK(file.get() >= 0, DataError, "{}: cannot be read: {}", path.string(), refusal(errno));
  struct stat status{};
  MOESAIC_CHECK(::fstat(file.get(), &status) == 0, DataError, "{}: cannot be read: {}", path.string(), refusal(errno));
  MOESAIC_CHECK(!S_ISDIR(status.st_mode), DataError, "{}: is a folder, expected a file", path.string());
  std::string bytes;
  if (S_ISREG(status.st_mode)) {
    MOESAIC_CHECK(static_cast<uint64_t>(status.st_size) <= max_bytes, FormatError, "{}: {} bytes, expected at most {}",
                  path.string(), status.st_size, max_bytes);
    bytes.reserve(static_cast<size_t>(status.st_size) + 1);
  }
  std::array<char, size_t{1} << 16> buffer;
  while (true) {
    ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) {  // the other end of a pipe has not written yet
      pollfd ready{file.get(), POLLIN, 0};
      ::poll(&ready, 1, -1);
      continue;
    }
    MOESAIC_CHECK(got >= 0, DataError, "{}: cannot be read: {}", path.string(), refusal(errno));
    if (got == 0) return bytes;
    bytes.append(buffer.data(), static_cast<size_t>(got));
    MOESAIC_CHECK(bytes.size() <= max_bytes, FormatError, "{}: larger than the {} bytes allowed here", path.string(),
                  max_bytes);
  }
}

void write_file_atomically(const std::filesystem::path& path, std::string_view bytes) {
  const std::string temporary = temporary_name(path);
  auto fail = [&](const char* what) {
    int reason = errno;
    ::unlink(temporary.c_str());
    throw DataError(fmt::format("{}: cannot {}: {}", path.string(), what, refusal(reason)));
  };
  FileDescriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (file.get() < 0) fail("be created");
  for (size_t done = 0; done < bytes.size();) {
    ssize_t wrote = ::write(file.get(), bytes.data() + done, bytes.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) fail("be written");
    done += static_cast<size_t>(wrote);
  }
  if (::fsync(file.get()) != 0 || ::close(file.release()) != 0) fail("be written");
  if (::rename(temporary.c_str(), path.c_str()) != 0) fail("be renamed into place");
  // The rename itself is durable only once the folder is on disk.
  std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  FileDescriptor parent(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (parent.get() >= 0) ::fsync(parent.get());
}

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  constexpr size_t kPart = 3;  // letters of a name that may stand for it
  const std::string wanted = letters_of(name);
  size_t allowed = std::max<size_t>(1, wanted.size() / 4);
  std::string best;
  for (const std::string& candidate : candidates) {
    const std::string letters = letters_of(candidate);
    const bool begun = wanted.size() >= kPart && letters.starts_with(wanted);
    const size_t distance = std::min(edit_distance(wanted, letters), begun ? size_t{1} : std::string::npos);
    if (distance <= allowed) {
      best = candidate;
      if (distance == 0) break;
      allowed = distance - 1;
    }
  }
  if (!best.empty() || wanted.size() < kPart) return best;
  auto contains = [&](const std::string& candidate) { return letters_of(candidate).find(wanted) != std::string::npos; };
  const auto it = std::find_if(candidates.begin(), candidates.end(), contains);
  return it == candidates.end() ? "" : *it;
}

}  // namespace moesaic
