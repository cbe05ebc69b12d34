// The engine on a thread of its own, and the queue in front of it.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moesaic/generate/engine.h"
#include "moesaic/serve/catalog.h"

namespace moesaic::serve {

struct ServiceOptions {
  generate::EngineOptions engine;
  int64_t max_queue = 256;    // requests that wait
  double queue_timeout = 60;  // seconds that one waits at most
};

/// What a client asks of the service.
struct Ask {
  generate::Request request;  // prompt.mixture is made of `weights`
  Weights weights;
  std::shared_ptr<generate::Listener> listener;
  std::string key;                                   // whose turn it is among those who wait
  std::chrono::steady_clock::time_point deadline{};  // by when it is answered
};

/// Figures of the moment.
struct Load {
  int64_t running = 0, waiting = 0;  // requests
  double memory_share = 0;           // of keys and values, reserved and kept
  double seconds_since_step = 0;     // while there is something to do
};

/// Keys take turns, each in proportion to what its requests cost in tokens; those of one key come in their order. Every
/// method may be called from any thread; listeners hear from the engine's.
class Service {
 public:
  Service(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer, ServiceOptions options);
  /// What still runs fails.
  ~Service();

  /// Throws ApiError 429 with the seconds after which to come again when the queue is full, 503 when draining.
  int64_t submit(Ask ask);
  /// Its listener hears nothing more, soon.
  void cancel(int64_t number);
  /// Calls `work` on the engine's thread between two steps and waits for it; throws what it throws.
  void between_steps(const std::function<void(generate::Engine&)>& work);
  /// Detaches the adapter as soon as no request uses it.
  void detach(const std::string& adapter);
  /// Takes nothing new and waits until all that was taken is answered, so many seconds at most; what then is left fails
  /// with ApiError 503. Returns how many that were.
  int64_t drain(double seconds);
  bool draining() const { return draining_; }
  Load load() const;

 private:
  struct Waiting {
    int64_t number;
    Ask ask;
    std::chrono::steady_clock::time_point since;
    int64_t cost() const;
  };
  struct Queue {
    std::deque<Waiting> asks;
    int64_t credit = 0;  // tokens that its key may take before the next one's turn
  };
  struct Running {
    int64_t number;  // of the service
    Ask ask;
  };
  class Relay;

  void run();
  void expire();
  void admit(generate::Engine& engine);
  void fail_all(const std::string& why);
  void finish(int64_t of_engine);

  models::LanguageModel& model_;
  ServiceOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_, idle_;
  std::map<std::string, Queue> queues_;
  std::string turn_;  // the key whose turn it is
  int64_t waiting_ = 0, waiting_tokens_ = 0, next_ = 1;
  std::vector<int64_t> cancelled_;
  std::deque<std::function<void(generate::Engine&)>> work_;
  std::vector<std::string> leaving_;    // adapters
  std::map<int64_t, Running> running_;  // by the engine's number; the engine's thread alone
  std::atomic<int64_t> running_count_ = 0, bytes_ = 0;
  std::atomic<double> tokens_per_second_ = 100;
  std::atomic<std::chrono::steady_clock::time_point> last_step_{};
  std::atomic<bool> busy_ = false, draining_ = false, stopping_ = false;
  generate::Engine engine_;
  std::thread thread_;
};

}  // namespace moesaic::serve
