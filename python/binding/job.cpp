#include "python/binding/job.h"

#include "python/binding/guarded.h"

namespace moesaic::python {

Job::Job(Work work)
    : thread_([this, work = std::move(work)]() mutable {
        std::string result;
        std::exception_ptr error;
        try {
          result = guarded([&] { return work(*this); });
        } catch (...) {
          error = std::current_exception();
        }
        work = nullptr;  // what it held is free when it is known to be done
        const std::lock_guard lock(mutex_);
        result_ = std::move(result);
        error_ = error;
        done_ = true;
        changed_.notify_all();
      }) {}

Job::~Job() {
  stop();
  thread_.join();
}

bool Job::wait(double seconds) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return done_; });
}

std::vector<std::string> Job::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(told_, {});
}

void Job::tell(std::string line) {
  const std::lock_guard lock(mutex_);
  told_.push_back(std::move(line));
}

std::string Job::result() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_; });
  if (error_) std::rethrow_exception(error_);
  return result_;
}

}  // namespace moesaic::python
