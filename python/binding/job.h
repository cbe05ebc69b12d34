// Long work on a thread of its own: Python asks how far it is, and may stop it.
#pragma once
#include <torch/custom_class.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace moesaic::python {

class Job : public torch::CustomClassHolder {
 public:
  /// Returns the result, a JSON text.
  using Work = std::function<std::string(Job& job)>;
  explicit Job(Work work);
  /// Stops it, and waits for it.
  ~Job() override;

  /// Waits so many seconds at most. True when the work is done.
  bool wait(double seconds);
  /// What was told since the last call.
  std::vector<std::string> take();
  void stop() { stopping_ = true; }
  /// Waits for the work; throws what it threw.
  std::string result();

  // For the work.
  bool stopping() const { return stopping_; }
  void tell(std::string line);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> told_;
  std::string result_;
  std::exception_ptr error_;
  bool done_ = false;
  std::atomic<bool> stopping_ = false;
  std::thread thread_;  // the last: it uses the others
};

/// What work throws that was stopped where it can leave nothing behind.
struct Stopped : std::runtime_error {
  Stopped() : std::runtime_error("[Stopped] stopped") {}
};

}  // namespace moesaic::python
