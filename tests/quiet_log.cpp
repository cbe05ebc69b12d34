// Linked into every test binary: log messages off, so that a test's own output stands out.
#include <spdlog/spdlog.h>

namespace {
[[maybe_unused]] const bool quiet = (spdlog::set_level(spdlog::level::off), true);
}
