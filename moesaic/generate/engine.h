// Many answers in the making at once: requests join and leave between two steps of one model.
#pragma once
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/generate/generate.h"

namespace moesaic::generate {

/// A token and what the model thought of it: natural logarithms of the softmax over float32 logits, before penalties,
/// bias and temperature.
struct TokenLogprob {
  int64_t id = 0;
  float logprob = 0;
  std::vector<std::pair<int64_t, float>> top{};  // the likeliest tokens, the likeliest first
};

/// A prompt and how it is to be answered, sampling.num_return_sequences times; no beams.
struct Request {
  Prompt prompt;
  SamplingOptions sampling;
  int64_t logprobs = -1;         // above -1: answers come with log-probabilities, and those of so many likeliest tokens
  bool prompt_logprobs = false;  // so do the prompt's tokens; nothing of it is reused then
  std::string salt{};            // what was read is reused by requests of the same salt alone
};

/// One more token of an answer.
struct Piece {
  int64_t id = 0;
  std::string text{};                     // what became certain with it; may be empty
  std::optional<TokenLogprob> logprob{};  // where asked for
  std::string finish_reason{};            // stop | length, of the last token; empty before
  std::string stop{};                     // the stop string that ended it; empty: another end
};

/// Who asked. Called by step(), on its thread.
class Listener {
 public:
  virtual ~Listener() = default;
  /// The prompt was read, `reused` tokens of it earlier. `prompt`: its tokens from the second on, where asked for.
  virtual void began(int64_t reused, std::vector<TokenLogprob> prompt) {}
  /// Returns false when nobody wants the rest of the answer.
  virtual bool more(int64_t answer, Piece piece) = 0;
  /// The request ends here: DataError where the model's figures are not finite.
  virtual void failed(std::exception_ptr error) = 0;
};

struct EngineOptions {
  int64_t most_answers = INT64_MAX;   // in the making at once; a request with more of them runs alone
  int64_t memory_bytes = INT64_MAX;   // of keys and values; requests wait until theirs fit
  int64_t kept = 0;                   // texts that were read and are kept for prompts that begin alike
  int64_t step_tokens = INT64_MAX;    // prompt tokens that a step reads at most
  double step_seconds = 0;            // above 0: prompts are read in parts, so that a step takes about this long
  bool alike = true;                  // an answer has the same bits whatever is beside it and was reused
  RoutingCallback routing = nullptr;  // what routers decided; requests are numbered from 0 as submitted
};

/// Steps a model through the texts of all requests. A step runs the answers' newest tokens together, then prompts, in
/// parts where that is asked for. Alone or in company, read at once or in parts, with or without a part that was kept:
/// with `alike`, decoders give the same bits in float32 and int8 on the CPU, for one number of threads. Compositions
/// and encoder-decoders read a prompt at once and reuse none of it.
///
/// Not for several threads.
class Engine {
 public:
  Engine(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer, EngineOptions options);
  ~Engine();

  /// Queues a request, first come, first served, and returns its number. Throws UsageError for what text_of and
  /// generate refuse and for what can never fit memory_bytes, DataError for token ids outside of the vocabulary.
  int64_t submit(Request request, std::shared_ptr<Listener> listener);
  /// Ends a request; its listener hears nothing more.
  void cancel(int64_t request);
  /// Returns false when there is nothing left to do.
  bool step();

  /// Gives the model an adapter; requests that were submitted before give it no weight. Throws as
  /// LanguageModel::attach.
  void attach(const std::string& name, std::shared_ptr<nn::Attachment> attachment);
  /// Takes it back; returns false, and does nothing, while a request gives it a weight.
  bool detach(const std::string& name);

  int64_t waiting() const { return std::ssize(waiting_); }  // requests, since those that run leave them no room
  int64_t answers() const;                                  // in the making, or whose prompt is read
  int64_t bytes() const;                                    // reserved by requests that run, and of what is kept

 private:
  struct Job;
  struct Row;

  void leave();
  void drop(const std::function<bool(const Row&)>& gone);
  void for_mixtures(const std::function<void(std::vector<double>&)>& change);
  void enter();
  bool fits(const Job& job);
  std::pair<int64_t, int64_t> donor(const Job& job) const;
  void decode();
  void read();
  void begin(const std::vector<size_t>& rows, const torch::Tensor& hidden, const std::vector<int64_t>& ends);
  void draw(const std::vector<size_t>& rows, torch::Tensor logits);
  torch::Tensor run(const models::Text& text);
  torch::Tensor logits(const torch::Tensor& hidden) const;
  void fail(const std::vector<size_t>& rows, const std::exception_ptr& error);
  int64_t budget() const;
  bool reads_in_parts(const Job& job) const;
  int64_t reserved(const Job& job) const;

  models::LanguageModel& model_;
  const tokenizer::Tokenizer& tokenizer_;
  EngineOptions options_;
  std::unique_ptr<models::Memory> memory_;
  std::vector<Row> rows_;  // of the memory's sequences
  std::deque<std::shared_ptr<Job>> waiting_;
  int64_t next_ = 0;              // number of the next request
  int64_t clock_ = 0;             // counts steps, to tell what was used last
  double decode_seconds_ = 0;     // of the last step
  double seconds_per_token_ = 0;  // of prompts, smoothed
};

}  // namespace moesaic::generate
