// What reading questions from files shares.
#pragma once
#include <filesystem>
#include <fstream>
#include <string>

#include "moesaic/base/json.h"
#include "moesaic/base/text.h"

namespace moesaic::eval {

inline OrderedJson user_turn(const std::string& text) {
  return OrderedJson::array({{{"role", "user"}, {"content", text}}});
}

/// Collects what is wrong with a file's rows, so that one message says it all.
class RowErrors {
 public:
  void add(const std::string& what) {
    if (++count_ <= 10) text_ += "\n  " + what;
  }
  void throw_if_any(const std::string& path) const {
    MOESAIC_CHECK(count_ == 0, DataError, "{}: {} damaged rows:{}{}", path, count_, text_,
                  count_ > 10 ? fmt::format("\n  and {} more", count_ - 10) : "");
  }

 private:
  int64_t count_ = 0;
  std::string text_;
};

/// Calls use(line, number) for every line that is not blank; numbers from 1.
template <class Use>
void each_line(const std::filesystem::path& path, Use&& use) {
  std::ifstream file(path);
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") != std::string::npos) use(line, number);
  }
}

}  // namespace moesaic::eval
