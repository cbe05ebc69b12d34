// The three standard streams, as a program finds them and leaves them.
#pragma once
#include <fmt/format.h>

#include <cstdio>
#include <string_view>

#include "moesaic/base/visible.h"

namespace moesaic::cli {

/// Puts /dev/null where a standard stream is closed: no file we open gets its number.
void open_closed_streams();

/// A write beyond the limit on a file's size fails, as on a full disk, instead of ending the program.
void let_writes_fail();

/// Writes to standard output as it is.
void say_raw(std::string_view text);
/// Prints to standard output; control characters that came from files and models are made visible.
void say(std::string_view text);
template <typename First, typename... Args>
void say(fmt::format_string<First, Args...> format, First&& first, Args&&... args) {
  say(fmt::format(format, std::forward<First>(first), std::forward<Args>(args)...));
}

/// The same to standard error.
template <typename... Args>
void say_error(fmt::format_string<Args...> format, Args&&... args) {
  std::fputs(visible(fmt::format(format, std::forward<Args>(args)...)).c_str(), stderr);
}

/// Throws DataError unless all that was printed is written.
void check_printed();

}  // namespace moesaic::cli
