// The three standard streams, as a program finds them and leaves them.
#pragma once
#include <cstdio>

namespace moesaic::cli {

/// Puts /dev/null where a standard stream is closed: no file we open gets its number.
void open_closed_streams();

/// A write beyond the limit on a file's size fails, as on a full disk, instead of ending the program.
void let_writes_fail();

/// Throws DataError unless all that was printed is written.
void check_printed();

}  // namespace moesaic::cli
