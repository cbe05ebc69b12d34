#include "moesaic/base/progress.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "moesaic/base/visible.h"

namespace moesaic {
namespace {

constexpr double kRedrawSeconds = 0.1;
constexpr int64_t kBarWidth = 24;

size_t terminal_width(std::FILE* stream) {
  winsize size{};
  return ::ioctl(::fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

double seconds_between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  auto whole = std::llround(seconds);
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{}:{:02} min", whole / 60, whole % 60);
  return fmt::format("{}:{:02}:{:02} h", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string format_count(double count) {
  if (count < 1e3) return fmt::format("{:.0f}", count);
  if (count < 1e6) return fmt::format("{:.1f}k", count / 1e3);
  if (count < 1e9) return fmt::format("{:.1f}M", count / 1e6);
  return fmt::format("{:.1f}G", count / 1e9);
}

Progress::Progress(std::string title, int64_t total, int64_t start, std::FILE* stream, double plain_seconds)
    : title_(std::move(title)),
      total_(std::max<int64_t>(total, 1)),
      start_(start),
      done_(start),
      stream_(stream),
      plain_seconds_(plain_seconds),
      terminal_(::isatty(::fileno(stream)) != 0),
      visible_(spdlog::get_level() <= spdlog::level::info),
      begin_(Clock::now()),
      last_draw_(begin_) {}

Progress::~Progress() { finish(); }

void Progress::update(int64_t done, const std::string& note) {
  done_ = done;
  note_ = note;
  double since_last = seconds_between(last_draw_, Clock::now());
  if (since_last >= (terminal_ ? kRedrawSeconds : plain_seconds_)) draw(false);
}

void Progress::finish() {
  if (finished_) return;
  finished_ = true;
  draw(true);
}

void Progress::draw(bool last) {
  if (!visible_) return;
  last_draw_ = Clock::now();
  double elapsed = seconds_between(begin_, last_draw_);
  std::string time;
  if (last) {
    time = "in " + format_duration(elapsed);
  } else if (done_ > start_) {
    time =
        format_duration(elapsed * static_cast<double>(total_ - done_) / static_cast<double>(done_ - start_)) + " left";
  }
  std::string line = fmt::format("{} {}/{}", visible_in_line(title_), done_, total_);
  if (terminal_) {
    int64_t filled = std::clamp<int64_t>(done_ * kBarWidth / total_, 0, kBarWidth);
    line += fmt::format(" [{}{}]", std::string(filled, '#'), std::string(kBarWidth - filled, '.'));
  }
  for (const std::string& part : {note_, time}) {
    if (!part.empty()) line += "  " + part;
  }
  if (terminal_) {
    // The cursor stays at the line's begin, so that a log message replaces the bar.
    line.resize(std::min(line.size(), terminal_width(stream_) - 1));
    line = fmt::format("\r{}\033[K{}", line, last ? "\n" : "\r");
  } else {
    line += '\n';
  }
  std::fputs(line.c_str(), stream_);  // a stream that can't be written is no reason to end
  std::fflush(stream_);
}

}  // namespace moesaic
