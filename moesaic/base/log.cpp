#include "moesaic/base/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "moesaic/base/check.h"
#include "moesaic/base/visible.h"

namespace moesaic {
namespace {

/// The message, as a terminal may be given it.
class VisibleMessage : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&, spdlog::memory_buf_t& out) override {
    const std::string text = visible({message.payload.data(), message.payload.size()});
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override { return std::make_unique<VisibleMessage>(); }
};

std::unique_ptr<spdlog::formatter> formatter(const std::string& mark) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  // On a terminal a progress bar may stand in this line: clear what is left of it.
  formatter->add_flag<VisibleMessage>('V').set_pattern(mark +
                                                       (::isatty(STDERR_FILENO) ? "%^%l%$: %V\033[K" : "%l: %V"));
  return formatter;
}

}  // namespace

void set_log_level(const std::string& level) {
  auto parsed = spdlog::level::from_str(level);
  MOESAIC_CHECK(parsed != spdlog::level::off || level == "off", UsageError,
                "--log-level {}: expected trace, debug, info, warning, error or off", level);
  static const auto logger = [] {
    auto stderr_logger = spdlog::stderr_color_mt("moesaic");
    stderr_logger->set_formatter(formatter(""));
    return stderr_logger;
  }();
  spdlog::set_default_logger(logger);
  spdlog::set_level(parsed);
}

void mark_log(const std::string& mark) { spdlog::default_logger()->set_formatter(formatter(mark)); }

}  // namespace moesaic
