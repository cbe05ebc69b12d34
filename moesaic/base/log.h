// Log messages go through spdlog (spdlog::info, warn, ...) to stderr; this fixes where and how they appear.
#pragma once
#include <string>

namespace moesaic {

/// Sends spdlog's default logger to stderr as "level: message" and sets its level:
/// trace | debug | info | warning | error | off. Throws UsageError for another name.
void set_log_level(const std::string& level);

/// Puts `mark` before every message.
void mark_log(const std::string& mark);

}  // namespace moesaic
