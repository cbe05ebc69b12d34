// One request on its way: what a client hears, whole or as server-sent events.
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moesaic/serve/completions.h"
#include "moesaic/serve/dialect.h"
#include "moesaic/serve/http.h"
#include "moesaic/serve/metrics.h"
#include "moesaic/serve/service.h"

namespace moesaic::serve {

/// What became of a request, for the log.
struct Outcome {
  int status = 200;
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  double first_token_seconds = 0, seconds = 0;
  std::string finish;
};

/// One request on its way: it asks the service for every prompt and writes what comes to its client.
class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  using Done = std::function<void(const Outcome&)>;
  /// headers: of every answer beside those of its content. http, service, metrics and around outlive this.
  Exchange(HttpServer& http, uint64_t id, Completion asked, const Surroundings& around, Metrics& metrics,
           Headers headers, std::unique_ptr<Dialect> dialect, Done done);
  ~Exchange();
  /// Asks. Throws ApiError before anything was sent.
  void start(Service& service, const std::string& key);
  /// The client left.
  void gone();

 private:
  class Prompt;
  struct Choice;

  void began(size_t prompt, int64_t reused, std::vector<generate::TokenLogprob> scores);
  bool more(size_t prompt, int64_t answer, generate::Piece piece);
  void failed(const std::exception_ptr& error);
  void end();
  void finish(Outcome outcome);
  void write(const OrderedJson& chunk);
  OrderedJson chunk(size_t choice, OrderedJson delta, OrderedJson logprobs, bool last = false) const;
  static OrderedJson stop_reason(const Choice& choice);
  OrderedJson token_json(const generate::TokenLogprob& token) const;
  void add_logprob(Choice& choice, const generate::TokenLogprob* logprob, int64_t id) const;
  OrderedJson message_of(const Choice& choice) const;
  OrderedJson usage() const;
  OrderedJson envelope() const;
  std::string text_of(int64_t id) const;

  HttpServer& http_;
  const uint64_t id_;
  const Completion asked_;
  const Surroundings& around_;
  Metrics& metrics_;
  const Headers headers_;
  const std::unique_ptr<Dialect> dialect_;
  Done done_;
  Service* service_ = nullptr;
  const std::string name_;  // "chatcmpl-..."
  const int64_t created_;
  const std::chrono::steady_clock::time_point start_;

  mutable std::mutex mutex_;  // events come from the engine's thread, departures from the server's
  std::vector<int64_t> numbers_;
  std::vector<Choice> choices_;
  size_t ended_ = 0;  // choices
  bool begun_ = false, over_ = false;
  Outcome outcome_;
};

}  // namespace moesaic::serve
