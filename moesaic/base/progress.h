// Progress of long work: a bar on a terminal, plain lines elsewhere.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace moesaic {

/// "4 s", "3:07 min", "2:05:09 h".
std::string format_duration(double seconds);
/// 1234567 -> "1.2M"; 9876 -> "9.9k"; 812 -> "812".
std::string format_count(double count);

/// Shows how far some work is, its rate and the time left.
///
/// On a terminal one line is redrawn at most ten times a second; elsewhere a line is printed every `plain_seconds` and
/// at the end. Nothing is printed when the log level is above info.
class Progress {
 public:
  /// `total` units of work, of which `start` were done before (a resumed run).
  Progress(std::string title, int64_t total, int64_t start = 0, std::FILE* stream = stderr, double plain_seconds = 10);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `done` units of `total` are done; `note` is shown behind ("loss 1.234, 812 tokens/s").
  void update(int64_t done, const std::string& note = "");
  /// Draws the last state and ends the line. Called by the destructor when it was not called before.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  void draw(bool last);

  std::string title_, note_;
  int64_t total_, start_, done_;
  std::FILE* stream_;
  double plain_seconds_;
  bool terminal_, visible_, finished_ = false;
  Clock::time_point begin_, last_draw_;
};

}  // namespace moesaic
