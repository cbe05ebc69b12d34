#pragma once

namespace moesaic::cli {

extern const char* const kCommit;  // that the program was built from, "-dirty" behind it when files had changed

}  // namespace moesaic::cli
