#include "moesaic/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "moesaic/base/check.h"

namespace moesaic {

void set_log_level(const std::string& level) {
  auto parsed = spdlog::level::from_str(level);
  MOESAIC_CHECK(parsed != spdlog::level::off || level == "off", UsageError,
                "--log-level {}: expected trace, debug, info, warning, error or off", level);
  static const auto logger = [] {
    auto stderr_logger = spdlog::stderr_color_mt("moesaic");
    // On a terminal a progress bar may stand in this line: clear what is left of it.
    stderr_logger->set_pattern(::isatty(STDERR_FILENO) ? "%^%l%$: %v\033[K" : "%l: %v");
    return stderr_logger;
  }();
  spdlog::set_default_logger(logger);
  spdlog::set_level(parsed);
}

}  // namespace moesaic
