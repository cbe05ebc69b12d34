// Signals as a wish instead of an end.
#pragma once
#include <csignal>
#include <initializer_list>
#include <utility>
#include <vector>

namespace moesaic::cli {

/// While it lives, these signals are noted instead of ending the program. One lives at a time.
class CatchSignals {
 public:
  /// once: after the first SIGINT or SIGTERM both have their usual effect again. SIGHUP stays ignored where it was.
  CatchSignals(std::initializer_list<int> signals, bool once);
  ~CatchSignals();
  CatchSignals(const CatchSignals&) = delete;
  CatchSignals& operator=(const CatchSignals&) = delete;

  /// Whether one came.
  bool caught() const;

 private:
  std::vector<std::pair<int, struct sigaction>> before_;
};

}  // namespace moesaic::cli
