#include "moesaic/run/plan.h"

#include <fmt/format.h>

namespace moesaic::run {

std::string Plan::text() const {
  std::string text;
  for (const auto& [label, line] : lines) text += fmt::format("{:<11}{}\n", label, line);
  return text;
}

}  // namespace moesaic::run
