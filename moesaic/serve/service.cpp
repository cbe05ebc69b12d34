#include "moesaic/serve/service.h"

#include <algorithm>
#include <cmath>
#include <future>

#include "moesaic/base/check.h"
#include "moesaic/serve/api_error.h"

namespace moesaic::serve {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kAhead = 16;  // requests that the engine holds ready
constexpr int64_t kTurn = 512;  // tokens that a key's turn is worth

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

}  // namespace

int64_t Service::Waiting::cost() const {
  const generate::SamplingOptions& sampling = ask.request.sampling;
  return std::ssize(ask.request.prompt.ids) + sampling.max_new_tokens * sampling.num_return_sequences;
}

/// Passes a request's events on, and notes its end.
class Service::Relay : public generate::Listener {
 public:
  Relay(Service& service, std::shared_ptr<generate::Listener> to, int64_t answers)
      : service_(service), to_(std::move(to)), left_(answers) {}

  void began(int64_t reused, std::vector<generate::TokenLogprob> prompt) override {
    to_->began(reused, std::move(prompt));
  }
  bool more(int64_t answer, generate::Piece piece) override {
    const bool ended = !piece.finish_reason.empty();
    const bool wanted = to_->more(answer, std::move(piece));
    if ((ended || !wanted) && --left_ == 0) service_.finish(number);
    return wanted;
  }
  void failed(std::exception_ptr error) override {
    to_->failed(std::move(error));
    service_.finish(number);
  }

  int64_t number = -1;  // the engine's

 private:
  Service& service_;
  std::shared_ptr<generate::Listener> to_;
  int64_t left_;
};

Service::Service(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer, ServiceOptions options)
    : model_(model),
      options_(std::move(options)),
      last_step_(Clock::now()),
      engine_(model, tokenizer, options_.engine),
      thread_([this] { run(); }) {}

Service::~Service() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

int64_t Service::submit(Ask ask) {
  const std::lock_guard lock(mutex_);
  if (draining_ || stopping_) throw ApiError(503, "the server is shutting down", "", 1);
  if (waiting_ >= options_.max_queue) {
    const double seconds = static_cast<double>(waiting_tokens_) / std::max(1.0, tokens_per_second_.load());
    throw ApiError(429,
                   fmt::format("{} requests wait, expected {} at most: come again later", waiting_, options_.max_queue),
                   "", static_cast<int>(std::clamp(std::ceil(seconds), 1.0, 60.0)));
  }
  Waiting waiting{next_++, std::move(ask), Clock::now()};
  const int64_t number = waiting.number;
  ++waiting_;
  waiting_tokens_ += waiting.cost();
  queues_[waiting.ask.key].asks.push_back(std::move(waiting));
  changed_.notify_all();
  return number;
}

void Service::cancel(int64_t number) {
  const std::lock_guard lock(mutex_);
  cancelled_.push_back(number);
  changed_.notify_all();
}

void Service::between_steps(const std::function<void(generate::Engine&)>& work) {
  std::promise<void> done;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw ApiError(503, "the server is shutting down", "", 1);
    work_.push_back([&](generate::Engine& engine) {
      try {
        work(engine);
        done.set_value();
      } catch (...) {
        done.set_exception(std::current_exception());
      }
    });
  }
  changed_.notify_all();
  done.get_future().get();
}

void Service::detach(const std::string& adapter) {
  const std::lock_guard lock(mutex_);
  leaving_.push_back(adapter);
  changed_.notify_all();
}

int64_t Service::drain(double seconds) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  auto empty = [&] { return waiting_ == 0 && running_count_ == 0 && !busy_; };
  idle_.wait_for(lock, std::chrono::duration<double>(seconds), empty);
  const int64_t left = waiting_ + running_count_;
  lock.unlock();
  if (left > 0) between_steps([&](generate::Engine&) { fail_all("the server is shutting down"); });
  return left;
}

Load Service::load() const {
  const std::lock_guard lock(mutex_);
  const bool working = busy_ || waiting_ > 0;
  return {running_count_, waiting_, static_cast<double>(bytes_) / static_cast<double>(options_.engine.memory_bytes),
          working ? seconds_since(last_step_) : 0};
}

void Service::finish(int64_t of_engine) {
  running_.erase(of_engine);
  running_count_ = std::ssize(running_);
}

void Service::fail_all(const std::string& why) {
  const auto error = std::make_exception_ptr(ApiError(503, why, "", 1));
  std::vector<std::shared_ptr<generate::Listener>> listeners;
  for (const auto& [number, running] : running_) {
    engine_.cancel(number);
    listeners.push_back(running.ask.listener);
  }
  running_.clear();
  running_count_ = 0;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [key, queue] : queues_) {
      for (Waiting& waiting : queue.asks) listeners.push_back(waiting.ask.listener);
    }
    queues_.clear();
    waiting_ = waiting_tokens_ = 0;
  }
  for (const auto& listener : listeners) listener->failed(error);
}

/// Requests that were cancelled, or whose time is over.
void Service::expire() {
  const auto now = Clock::now();
  std::vector<std::pair<std::shared_ptr<generate::Listener>, ApiError>> failed;
  {
    const std::lock_guard lock(mutex_);
    const std::vector<int64_t> cancelled = std::exchange(cancelled_, {});
    auto is_cancelled = [&](int64_t number) {
      return std::find(cancelled.begin(), cancelled.end(), number) != cancelled.end();
    };
    for (auto& [key, queue] : queues_) {
      std::erase_if(queue.asks, [&](const Waiting& waiting) {
        const bool late = now > waiting.ask.deadline, long_ago = seconds_since(waiting.since) > options_.queue_timeout;
        if (!is_cancelled(waiting.number) && !late && !long_ago) return false;
        if (late) {
          failed.emplace_back(waiting.ask.listener, ApiError(504, "the request's time is over"));
        } else if (long_ago && !is_cancelled(waiting.number)) {
          failed.emplace_back(waiting.ask.listener,
                              ApiError(503, fmt::format("waited {} s in the queue", options_.queue_timeout), "", 5));
        }
        --waiting_;
        waiting_tokens_ -= waiting.cost();
        return true;
      });
    }
    std::erase_if(queues_, [](const auto& item) { return item.second.asks.empty(); });
    std::erase_if(running_, [&](const auto& item) {
      const bool late = now > item.second.ask.deadline;
      if (!late && !is_cancelled(item.second.number)) return false;
      engine_.cancel(item.first);
      if (late) failed.emplace_back(item.second.ask.listener, ApiError(504, "the request's time is over"));
      return true;
    });
    running_count_ = std::ssize(running_);
  }
  for (const auto& [listener, error] : failed) listener->failed(std::make_exception_ptr(error));
}

/// Gives the engine requests, turn by turn (deficit round robin; Shreedhar and Varghese 1995).
void Service::admit(generate::Engine& engine) {
  while (engine.waiting() < kAhead) {
    std::optional<Waiting> next;
    {
      const std::lock_guard lock(mutex_);
      if (queues_.empty()) return;
      auto turn = queues_.lower_bound(turn_);
      while (!next) {
        if (turn == queues_.end()) turn = queues_.begin();
        Queue& queue = turn->second;
        if (turn->first != turn_ || queue.credit <= 0) queue.credit += kTurn;
        turn_ = turn->first;
        const int64_t cost = queue.asks.front().cost();
        if (queue.credit < cost && queues_.size() > 1) {
          ++turn;
          continue;
        }
        queue.credit = std::max<int64_t>(queue.credit - cost, 0);
        next = std::move(queue.asks.front());
        queue.asks.pop_front();
        --waiting_;
        waiting_tokens_ -= cost;
        if (queue.asks.empty()) queues_.erase(turn);
      }
    }
    auto relay = std::make_shared<Relay>(*this, next->ask.listener, next->ask.request.sampling.num_return_sequences);
    try {
      generate::Request request = std::move(next->ask.request);
      request.prompt.mixture.assign(model_.attachments().size(), 0.0);
      for (const auto& [adapter, weight] : next->ask.weights) request.prompt.mixture[model_.column(adapter)] += weight;
      relay->number = engine.submit(std::move(request), relay);
      running_[relay->number] = {next->number, std::move(next->ask)};
      running_count_ = std::ssize(running_);
    } catch (...) {
      next->ask.listener->failed(std::current_exception());
    }
  }
}

void Service::run() {
  while (!stopping_) {
    std::deque<std::function<void(generate::Engine&)>> work;
    std::vector<std::string> leaving;
    {
      const std::lock_guard lock(mutex_);
      work.swap(work_);
      leaving.swap(leaving_);
    }
    for (const auto& each : work) each(engine_);
    for (const std::string& adapter : leaving) {
      if (!engine_.detach(adapter)) detach(adapter);
    }
    expire();
    admit(engine_);
    const auto start = Clock::now();
    const int64_t answers = engine_.answers();
    busy_ = engine_.step();
    last_step_ = Clock::now();
    bytes_ = engine_.bytes();
    if (answers > 0) {
      tokens_per_second_ = 0.9 * tokens_per_second_ + 0.1 * static_cast<double>(answers) / seconds_since(start);
    }
    std::unique_lock lock(mutex_);
    if (busy_) continue;
    idle_.notify_all();
    changed_.wait_for(lock, std::chrono::seconds(1), [&] {
      return stopping_ || waiting_ > 0 || !work_.empty() || !cancelled_.empty() || !leaving_.empty();
    });
    last_step_ = Clock::now();
  }
  fail_all("the server is shutting down");
  const std::lock_guard lock(mutex_);
  for (const auto& each : work_) each(engine_);
  work_.clear();
}

}  // namespace moesaic::serve
