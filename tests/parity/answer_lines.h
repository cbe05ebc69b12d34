// The protocol of the parity drivers: a JSON job per line on stdin, a JSON answer per line on stdout.
#pragma once
#include <functional>
#include <iostream>
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::test {

/// Answers every job; an exception becomes {"ok": false, "error"}. Returns main's exit status.
inline int answer_lines(const std::function<Json(const Json&)>& run) {
  for (std::string line; std::getline(std::cin, line);) {
    Json answer;
    try {
      answer = run(Json::parse(line));
    } catch (const std::exception& error) {
      answer = {{"ok", false}, {"error", error.what()}};
    }
    std::cout << answer.dump() << std::endl;
  }
  return 0;
}

}  // namespace moesaic::test
