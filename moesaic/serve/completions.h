// OpenAI's /v1/chat/completions and /v1/completions: bodies in, answers out, whole or as server-sent events.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/serve/catalog.h"
#include "moesaic/serve/http.h"
#include "moesaic/serve/metrics.h"
#include "moesaic/serve/service.h"

namespace moesaic::serve {

/// What every request meets.
struct Surroundings {
  const tokenizer::Tokenizer& tokenizer;
  const Catalog& catalog;
  std::vector<int64_t> eos_ids;
  int64_t vocab_size = 0;
  int64_t max_model_len = 0;      // tokens of a prompt and its answer
  double max_request_time = 600;  // seconds
  std::string fingerprint;        // system_fingerprint
};

/// A body, read and checked.
struct Completion {
  bool chat = false;
  std::string model;                   // as the client wrote it
  std::shared_ptr<const Entry> entry;  // what answers
  std::vector<std::vector<int64_t>> prompts;
  std::vector<std::string> texts;      // of the prompts, where they are echoed
  generate::SamplingOptions sampling;  // of every prompt; num_return_sequences is `n`
  bool stream = false, include_usage = false, echo = false;
  bool prompt_only = false;  // max_tokens 0: the prompt's scores alone
  int64_t logprobs = -1;     // how many of the likeliest tokens are told; -1: no log-probabilities
  bool seed_given = false;
  std::string salt;
  double timeout = 0;                  // seconds
  std::vector<std::string> unknown{};  // fields that this server does not know
};

/// Reads a body. path_model: the model that the path names, "" for none. Throws ApiError.
Completion read_completion(const OrderedJson& body, bool chat, const std::string& path_model,
                           const Surroundings& around);
/// messages as a chat template takes them: developers are systems, parts of text are joined. Throws ApiError.
OrderedJson read_messages(const OrderedJson& messages);
/// The adapters that a body names in `lora`, `adapter_id` or `model`. Throws ApiError.
std::shared_ptr<const Entry> read_entry(class Fields& fields, const std::string& path_model, const Catalog& catalog,
                                        std::string& model);

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
           Headers headers, Done done);
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
  OrderedJson chunk(size_t choice, OrderedJson delta, OrderedJson logprobs, const std::string& finish) const;
  OrderedJson token_json(const generate::TokenLogprob& token) const;
  void add_logprob(Choice& choice, const generate::TokenLogprob* logprob, int64_t id) const;
  OrderedJson usage() const;
  OrderedJson envelope() const;
  std::string text_of(int64_t id) const;

  HttpServer& http_;
  const uint64_t id_;
  const Completion asked_;
  const Surroundings& around_;
  Metrics& metrics_;
  const Headers headers_;
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
