#include "cli/streams.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"

namespace moesaic::cli {

void open_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) < 0 && errno == EBADF) open("/dev/null", stream == STDIN_FILENO ? O_RDONLY : O_WRONLY);
  }
}

void let_writes_fail() {
  std::signal(SIGXFSZ, [](int) {});  // a handler, which programs we start don't inherit
}

void say_raw(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

void say(std::string_view text) { say_raw(visible(text)); }

void check_printed() {
  errno = 0;
  const bool written = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  MOESAIC_CHECK(written, DataError, "standard output can't be written{}{}", errno != 0 ? ": " : "",
                errno != 0 ? refusal(errno) : "");
}

}  // namespace moesaic::cli
