#include "moesaic/generate/engine.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/generate/sampling.h"
#include "moesaic/generate/stop.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::generate {
namespace {

using Clock = std::chrono::steady_clock;
using Number = nn::AlikeRows::Number;

constexpr int64_t kBlock = 32;              // prompts are cut where their positions are multiples: attention's blocks
constexpr int64_t kFirstPart = 8 * kBlock;  // tokens of a prompt that are read before it is known how long one takes
constexpr int64_t kScoredRows = 64;         // prompt rows whose logits exist at once
constexpr double kGrowth = 1.25;            // of a cache's buffers, beyond what they hold
constexpr double kUnattended = 4;           // times step_seconds may pass while nobody waits for a next token

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// The tokenizer outlives a call; the decoder wants shared ownership.
std::shared_ptr<const tokenizer::Tokenizer> borrow(const tokenizer::Tokenizer& tokenizer) {
  return {std::shared_ptr<const void>(), &tokenizer};
}

bool holds(const std::vector<int64_t>& ids, int64_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }

TokenLogprob logprob_of(std::span<const float> logits, int64_t token, int64_t count) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float z : logits) sum += std::exp(z - largest);
  const float norm = largest + static_cast<float>(std::log(sum));
  TokenLogprob result{token, logits[token] - norm, {}};
  if (count == 0) return result;
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t most = std::min<int64_t>(count, std::ssize(order));
  std::partial_sort(order.begin(), order.begin() + most, order.end(),
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  for (int64_t i = 0; i < most; ++i) result.top.emplace_back(order[i], logits[order[i]] - norm);
  return result;
}

/// One answer in the making.
class Answer {
 public:
  Answer(int64_t index, const Request& request, std::vector<int64_t> continued, const tokenizer::Tokenizer& tokenizer)
      : index_(index),
        request_(request),
        prompt_(std::ssize(continued)),
        seen_(std::move(continued)),
        sampler_(
            request.sampling,
            derive_seed(request.sampling.seed, "answer",
                        static_cast<uint64_t>(request.sampling.first * request.sampling.num_return_sequences + index))),
        grammar_(request.sampling.grammar ? request.sampling.grammar->fork() : nullptr),
        decoder_(borrow(tokenizer)),
        stops_(request.sampling.stop) {}

  int64_t index() const { return index_; }
  /// The next token, from logits that it changes.
  std::pair<int64_t, std::optional<TokenLogprob>> draw(std::span<float> logits) {
    std::vector<float> plain;
    if (request_.logprobs >= 0) plain.assign(logits.begin(), logits.end());
    if (grammar_) grammar_->mask(logits);
    const int64_t token = sampler_.next(logits, seen_, prompt_);
    if (plain.empty()) return {token, std::nullopt};
    return {token, logprob_of(plain, token, request_.logprobs)};
  }
  /// Takes the token that was drawn.
  Piece take(int64_t token) {
    seen_.push_back(token);
    Piece piece{token};
    if (holds(request_.sampling.eos_ids, token)) {
      finish("stop", piece);
      return piece;
    }
    if (grammar_) grammar_->take(token);
    piece.text = stops_.push(decoder_.push(token));
    if (stops_.found()) {
      piece.finish_reason = "stop";
      piece.stop = stops_.what();
      if (request_.sampling.include_stop) piece.text += stops_.what();
    } else if (grammar_ && grammar_->ended()) {
      finish("stop", piece);
    } else if (std::ssize(seen_) - prompt_ >= request_.sampling.max_new_tokens) {
      finish("length", piece);
    }
    return piece;
  }

 private:
  void finish(const char* reason, Piece& piece) {
    piece.text += stops_.push(decoder_.finish());
    piece.text += stops_.finish();
    piece.finish_reason = stops_.found() ? "stop" : reason;
    if (stops_.found()) piece.stop = stops_.what();
  }

  int64_t index_;
  const Request& request_;
  int64_t prompt_;             // tokens of seen_ that the answer goes on
  std::vector<int64_t> seen_;  // these and the answer's
  Sampler sampler_;
  std::unique_ptr<tokenizer::Grammar> grammar_;  // where the answer stands in it
  tokenizer::StreamDecoder decoder_;
  StopStrings stops_;
};

}  // namespace

/// A request.
struct Engine::Job {
  int64_t number;
  Request request;
  std::shared_ptr<Listener> listener;
  int64_t reused = 0;
  std::vector<TokenLogprob> prompt{};  // of what was read
  bool gone = false;
  int64_t answers() const { return request.sampling.num_return_sequences; }
};

/// A sequence of the memory: a prompt that is read, an answer in the making, or a text that is kept.
struct Engine::Row {
  std::shared_ptr<Job> job;        // null: kept
  std::unique_ptr<Answer> answer;  // null: its prompt is read
  Prompt prompt;                   // that it began with
  std::string salt;
  std::vector<int64_t> seen{};    // the tokens that the memory holds
  std::optional<int64_t> next{};  // drawn and not run yet
  int64_t used = 0;               // step of its last use
  bool ended = false;
};

Engine::Engine(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer, EngineOptions options)
    : model_(model), tokenizer_(tokenizer), options_(std::move(options)), memory_(model.memory(0)) {}

Engine::~Engine() = default;

int64_t Engine::submit(Request request, std::shared_ptr<Listener> listener) {
  validate(request.sampling);
  MOESAIC_CHECK(request.sampling.num_beams == 1, UsageError, "num_beams: got {}, expected 1",
                request.sampling.num_beams);
  text_of(model_, {request.prompt});
  const int64_t vocabulary = model_.facts().vocab_size;
  for (const int64_t id : request.prompt.ids) {
    MOESAIC_CHECK(id >= 0 && id < vocabulary, DataError, "token id: got {}, expected 0 to {} (the vocabulary)", id,
                  vocabulary - 1);
  }
  const nn::Needs wants = model_.needs();
  const auto given = std::ssize(request.prompt.sentence);
  MOESAIC_CHECK(
      wants.sentence == nn::Needs::Sentence::kNone || given == wants.sentence_width ||
          (given == 0 && wants.sentence != nn::Needs::Sentence::kColumn),
      UsageError,
      "sentence: got {} numbers, expected {}: an adapter's router reads sentence embeddings from a data column", given,
      wants.sentence_width);
  if (request.prompt.mixture.empty()) request.prompt.mixture.assign(model_.attachments().size(), 1.0);
  auto job = std::make_shared<Job>(Job{next_++, std::move(request), std::move(listener)});
  MOESAIC_CHECK(reserved(*job) <= options_.memory_bytes, UsageError,
                "the prompt of {} tokens and {} answers of up to {}: need {} MiB of keys and values, expected {} at "
                "most (kv_memory)",
                job->request.prompt.ids.size(), job->answers(), job->request.sampling.max_new_tokens,
                reserved(*job) >> 20, options_.memory_bytes >> 20);
  waiting_.push_back(job);
  return job->number;
}

void Engine::cancel(int64_t request) {
  std::erase_if(waiting_, [&](const auto& job) { return job->number == request; });
  for (Row& row : rows_) {
    if (row.job && row.job->number == request) row.job->gone = true;
  }
}

int64_t Engine::answers() const {
  int64_t count = 0;
  for (const Row& row : rows_) count += row.answer ? 1 : row.job ? row.job->answers() : 0;
  return count;
}

bool Engine::reads_in_parts(const Job& job) const {
  const auto most = static_cast<int64_t>(job.request.prompt.ids.size()) + job.request.sampling.max_new_tokens;
  return !tokenizer_.prompts_apart() && most <= model_.exact_memory() &&
         (model_.parts().size() == 1 || !options_.alike);
}

int64_t Engine::reserved(const Job& job) const {
  const double tokens = static_cast<double>(job.request.prompt.ids.size()) +
                        static_cast<double>(std::min<int64_t>(job.request.sampling.max_new_tokens, 1 << 24));
  return static_cast<int64_t>(tokens * kGrowth * static_cast<double>(memory_->token_bytes() * job.answers()));
}

int64_t Engine::bytes() const {
  int64_t sum = 0;
  std::vector<const Job*> counted;
  for (const Row& row : rows_) {
    if (!row.job) {
      sum += static_cast<int64_t>(kGrowth * static_cast<double>(std::ssize(row.seen) * memory_->token_bytes()));
    } else if (std::find(counted.begin(), counted.end(), row.job.get()) == counted.end()) {
      counted.push_back(row.job.get());
      sum += reserved(*row.job);
    }
  }
  return sum;
}

void Engine::drop(const std::function<bool(const Row&)>& gone) {
  std::vector<int64_t> left;
  std::vector<Row> rows;
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (gone(rows_[b])) continue;
    left.push_back(static_cast<int64_t>(b));
    rows.push_back(std::move(rows_[b]));
  }
  if (left.size() < rows_.size()) memory_->keep(left);
  rows_ = std::move(rows);
}

void Engine::attach(const std::string& name, std::shared_ptr<nn::Attachment> attachment) {
  model_.attach(name, std::move(attachment), memory_.get());
  for_mixtures([](std::vector<double>& mixture) { mixture.push_back(0.0); });
}

bool Engine::detach(const std::string& name) {
  const int64_t column = model_.column(name);
  leave();
  bool used = false;
  for (const auto& job : waiting_) used = used || job->request.prompt.mixture[column] != 0;
  for (const Row& row : rows_) used = used || (row.job && row.prompt.mixture[column] != 0);
  if (used) return false;
  drop([&](const Row& row) { return !row.job && row.prompt.mixture[column] != 0; });
  model_.detach(name, memory_.get());
  for_mixtures([&](std::vector<double>& mixture) { mixture.erase(mixture.begin() + column); });
  return true;
}

void Engine::for_mixtures(const std::function<void(std::vector<double>&)>& change) {
  for (const auto& job : waiting_) change(job->request.prompt.mixture);
  for (Row& row : rows_) change(row.prompt.mixture);
}

bool Engine::step() {
  torch::NoGradGuard no_grad;
  ++clock_;
  leave();
  enter();
  const auto start = Clock::now();
  decode();
  decode_seconds_ = seconds_since(start);
  read();
  return !waiting_.empty() ||
         std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.job && !row.ended; });
}

/// Rows that ended go, or are kept.
void Engine::leave() {
  std::vector<int64_t> uses;  // of what is kept
  for (Row& row : rows_) {
    if (row.job && (row.ended || row.job->gone)) {
      row.ended = options_.alike && std::ssize(row.seen) < kBlock;  // no block of it can be reused
      row.job = nullptr;
      row.answer = nullptr;
      row.next.reset();
    }
    if (!row.job && !row.ended) uses.push_back(row.used);
  }
  const auto spare = std::ssize(uses) - options_.kept;
  std::sort(uses.begin(), uses.end());
  int64_t gone = 0;
  drop([&](const Row& row) {
    if (row.job || row.ended) return row.ended;
    return spare > 0 && row.used <= uses[spare - 1] && gone++ < spare;
  });
}

/// Makes room for a job by forgetting what was used longest ago.
bool Engine::fits(const Job& job) {
  const int64_t running = answers();
  if (running > 0 && running + job.answers() > options_.most_answers) return false;
  while (bytes() + reserved(job) > options_.memory_bytes) {
    int64_t oldest = -1;
    for (size_t b = 0; b < rows_.size(); ++b) {
      if (!rows_[b].job && (oldest < 0 || rows_[b].used < rows_[oldest].used)) oldest = static_cast<int64_t>(b);
    }
    if (oldest < 0) return false;
    drop([&](const Row& row) { return &row == &rows_[oldest]; });
  }
  return true;
}

/// The row whose text begins as the job's prompt for longest, and for how many tokens; -1: none.
std::pair<int64_t, int64_t> Engine::donor(const Job& job) const {
  std::pair<int64_t, int64_t> best{-1, 0};
  const Prompt& prompt = job.request.prompt;
  if (options_.kept == 0 || job.request.prompt_logprobs || !reads_in_parts(job)) return best;
  using Sentence = nn::Needs::Sentence;
  const Sentence sentence = model_.needs().sentence;
  const bool embedded = sentence == Sentence::kHidden || sentence == Sentence::kEncoder;  // the whole prompt
  for (size_t b = 0; b < rows_.size(); ++b) {
    const Row& row = rows_[b];
    if (row.salt != job.request.salt || row.prompt.sentence != prompt.sentence ||
        row.prompt.mixture != prompt.mixture || (embedded && row.prompt.ids != prompt.ids) ||
        std::ssize(row.seen) > model_.exact_memory()) {
      continue;
    }
    // The last token is always run: its logits are what comes next. Answers' tokens round otherwise than prompts'.
    int64_t most = std::min<int64_t>(std::ssize(prompt.ids) - 1, std::ssize(row.seen));
    if (options_.alike) most = std::min<int64_t>(most, std::ssize(row.prompt.ids));
    int64_t same =
        std::mismatch(prompt.ids.begin(), prompt.ids.begin() + most, row.seen.begin()).first - prompt.ids.begin();
    if (options_.alike) same = same / kBlock * kBlock;
    if (same > best.second) best = {static_cast<int64_t>(b), same};
  }
  return best;
}

/// Requests join, in their order, while they fit.
void Engine::enter() {
  while (!waiting_.empty() && fits(*waiting_.front())) {
    const std::shared_ptr<Job> job = waiting_.front();
    waiting_.pop_front();
    const auto [from, same] = donor(*job);
    Row row{job, nullptr, job->request.prompt, job->request.salt};
    if (from < 0) {
      memory_->add(1);
    } else {
      Row& source = rows_[from];
      // A text that goes on for long otherwise stays beside its copy.
      const bool moves = !source.job && 2 * same >= std::ssize(source.seen);
      source.used = clock_;
      std::vector<int64_t> order(rows_.size());
      std::iota(order.begin(), order.end(), 0);
      if (moves) order.erase(order.begin() + from);
      order.push_back(from);
      memory_->keep(order);
      const auto last = static_cast<int64_t>(order.size()) - 1;
      memory_->truncate(last, same);
      job->reused = memory_->length(last);
      row.seen.assign(row.prompt.ids.begin(), row.prompt.ids.begin() + job->reused);
      if (moves) rows_.erase(rows_.begin() + from);
    }
    rows_.push_back(std::move(row));
  }
}

torch::Tensor Engine::run(const models::Text& text) {
  std::vector<nn::RoutingRecord> records;
  nn::Pass pass;
  if (options_.routing) pass.routing = &records;
  const torch::Tensor hidden = model_.hidden(text, pass, memory_.get());
  if (options_.routing) {
    std::vector<int64_t> sequences;
    for (const Row& row : rows_) sequences.push_back(row.job ? row.job->number : -1);
    options_.routing(records, sequences);
  }
  return hidden;
}

torch::Tensor Engine::logits(const torch::Tensor& hidden) const {
  return model_.head().logits(hidden).to(torch::kCPU).contiguous();
}

void Engine::fail(const std::vector<size_t>& rows, const std::exception_ptr& error) {
  for (const size_t b : rows) {
    Row& row = rows_[b];
    row.ended = true;
    row.seen.clear();  // what the memory holds of it is not known
    if (!row.job->gone) row.job->listener->failed(error);
    row.job->gone = true;
  }
}

/// Runs every answer's newest token.
void Engine::decode() {
  std::vector<size_t> rows;
  std::vector<int64_t> tokens;
  models::Text text;
  text.tokens.offsets = {0};
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (rows_[b].next && !rows_[b].job->gone) {
      rows.push_back(b);
      tokens.push_back(*rows_[b].next);
    }
    text.tokens.offsets.push_back(std::ssize(tokens));
  }
  if (rows.empty()) return;
  const nn::AlikeRows alike(options_.alike ? Number::kFew : Number::kAny);
  try {
    text.tokens.tokens = torch::tensor(tokens, torch::kInt64).to(model_.facts().device);
    const torch::Tensor hidden = run(text);
    for (const size_t b : rows) {
      rows_[b].seen.push_back(*rows_[b].next);
      rows_[b].next.reset();
    }
    draw(rows, logits(hidden));
  } catch (...) {
    fail(rows, std::current_exception());
  }
}

/// Prompt tokens that this step may read.
int64_t Engine::budget() const {
  const int64_t most = std::max(options_.step_tokens, kBlock);
  if (options_.step_seconds <= 0) return most;
  if (seconds_per_token_ <= 0) return std::min(most, kFirstPart);
  const bool attended = std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.answer != nullptr; });
  const double seconds = attended ? options_.step_seconds - decode_seconds_ : kUnattended * options_.step_seconds;
  const auto tokens = static_cast<int64_t>(std::max(seconds, 0.0) / seconds_per_token_);
  return std::clamp<int64_t>(tokens / kBlock * kBlock, kBlock, most);
}

/// Reads prompts, in the order they came.
void Engine::read() {
  std::vector<size_t> order, rows;
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (rows_[b].job && !rows_[b].answer && !rows_[b].ended && !rows_[b].job->gone) order.push_back(b);
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return rows_[a].job->number < rows_[b].job->number; });
  int64_t left = budget();
  const bool with_sentence = !rows_[order[0]].prompt.sentence.empty();
  std::vector<int64_t> counts(rows_.size(), 0);
  for (const size_t b : order) {
    const Row& row = rows_[b];
    int64_t count = std::ssize(row.prompt.ids) - std::ssize(row.seen);
    if (row.prompt.sentence.empty() == with_sentence) continue;  // vectors are of all or of none
    if (count > left && reads_in_parts(*row.job)) {
      count = (std::ssize(row.seen) + left) / kBlock * kBlock - std::ssize(row.seen);
    } else if (count > left && !rows.empty()) {
      continue;
    }
    if (count <= 0) break;
    counts[b] = count;
    left -= count;
    rows.push_back(b);
    if (left <= 0) break;
  }
  std::sort(rows.begin(), rows.end());

  const auto start = Clock::now();
  const nn::AlikeRows alike(options_.alike ? Number::kMany : Number::kAny);
  const auto adapters = std::ssize(model_.attachments());
  const int64_t width = with_sentence ? std::ssize(rows_[order[0]].prompt.sentence) : 0;
  models::Text text;
  text.tokens.offsets = {0};
  text.borders.resize(rows_.size());
  text.prompts.resize(rows_.size());
  std::vector<int64_t> tokens, wanted, ends;  // ends: the place of each prompt's last row among those wanted, or -1
  std::vector<float> sentences(rows_.size() * width, 0.0f), mixture(rows_.size() * adapters, 1.0f);
  for (size_t b = 0; b < rows_.size(); ++b) {
    const Row& row = rows_[b];
    const auto first = row.prompt.ids.begin() + std::ssize(row.seen);
    if (counts[b] > 0) {
      const int64_t begin = std::ssize(tokens);
      tokens.insert(tokens.end(), first, first + counts[b]);
      text.prompts[b] = row.prompt.ids;
      std::copy(row.prompt.sentence.begin(), row.prompt.sentence.end(), sentences.begin() + b * width);
      std::copy(row.prompt.mixture.begin(), row.prompt.mixture.end(), mixture.begin() + b * adapters);
      const bool ended = std::ssize(row.seen) + counts[b] == std::ssize(row.prompt.ids);
      if (ended) text.borders[b] = {std::ssize(row.prompt.ids)};
      for (int64_t n = begin; row.job->request.prompt_logprobs && n + 1 < std::ssize(tokens); ++n) wanted.push_back(n);
      if (ended || row.job->request.prompt_logprobs) wanted.push_back(std::ssize(tokens) - 1);
      ends.push_back(ended ? std::ssize(wanted) - 1 : -1);
    }
    text.tokens.offsets.push_back(std::ssize(tokens));
  }
  if (wanted.empty()) wanted.push_back(0);
  const torch::Device device = model_.facts().device;
  try {
    text.tokens.tokens = torch::tensor(tokens, torch::kInt64).to(device);
    text.rows = torch::tensor(wanted, torch::kInt64).to(device);
    if (width > 0) text.sentence = torch::tensor(sentences).view({-1, width});
    // Weights of one throughout are left out: experts then run as in training.
    const bool mixed = std::any_of(mixture.begin(), mixture.end(), [](float weight) { return weight != 1; });
    if (mixed || (adapters > 0 && memory_->mixture.defined()))
      text.mixture = torch::tensor(mixture).view({-1, adapters});
    const torch::Tensor hidden = run(text);
    for (const size_t b : rows) {
      const auto first = rows_[b].prompt.ids.begin() + std::ssize(rows_[b].seen);
      rows_[b].seen.insert(rows_[b].seen.end(), first, first + counts[b]);
    }
    begin(rows, hidden, ends);
  } catch (...) {
    fail(rows, std::current_exception());
  }
  const double each = seconds_since(start) / static_cast<double>(tokens.size());
  seconds_per_token_ = seconds_per_token_ > 0 ? 0.7 * seconds_per_token_ + 0.3 * each : each;
}

/// Scores prompts where asked for, and begins the answers to those that were read to their ends. `hidden`: the rows
/// wanted of `rows`, one after the other; ends: which of them end prompts.
void Engine::begin(const std::vector<size_t>& rows, const torch::Tensor& hidden, const std::vector<int64_t>& ends) {
  int64_t place = 0;
  std::vector<int64_t> last;
  std::vector<size_t> begun;
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows_[rows[i]];
    Job& job = *row.job;
    if (job.request.prompt_logprobs) {
      // Row n of the text tells of token n + 1.
      const int64_t scored = std::ssize(row.seen) - 1 - std::ssize(job.prompt) + (ends[i] < 0 ? 1 : 0);
      for (int64_t first = 0; first < scored; first += kScoredRows) {
        const int64_t count = std::min(kScoredRows, scored - first);
        const torch::Tensor z = logits(hidden.narrow(0, place + first, count));
        for (int64_t n = 0; n < count; ++n) {
          const int64_t token = row.prompt.ids.at(job.prompt.size() + 1);
          job.prompt.push_back(logprob_of({z[n].data_ptr<float>(), static_cast<size_t>(z.size(1))}, token,
                                          std::max<int64_t>(job.request.logprobs, 0)));
        }
      }
      place += scored + (ends[i] < 0 ? 0 : 1);
    } else if (ends[i] >= 0) {
      ++place;
    }
    if (ends[i] < 0) continue;
    last.push_back(ends[i]);
    begun.push_back(rows[i]);
    job.listener->began(job.reused, std::move(job.prompt));
  }
  if (begun.empty()) return;
  const nn::AlikeRows alike(options_.alike ? Number::kFew : Number::kAny);
  torch::Tensor z = logits(hidden.index_select(0, torch::tensor(last, torch::kInt64).to(hidden.device())));
  // Each further answer goes on a copy.
  std::vector<int64_t> order(rows_.size()), sources;
  std::iota(order.begin(), order.end(), 0);
  std::vector<size_t> drawn;
  std::vector<Row> copies;
  for (size_t i = 0; i < begun.size(); ++i) {
    Row& row = rows_[begun[i]];
    const std::vector<int64_t> continued = model_.continued(row.prompt.ids);
    for (int64_t n = 0; n < row.job->answers(); ++n) {
      auto answer = std::make_unique<Answer>(n, row.job->request, continued, tokenizer_);
      sources.push_back(static_cast<int64_t>(i));
      if (n == 0) {
        row.answer = std::move(answer);
        drawn.push_back(begun[i]);
        continue;
      }
      drawn.push_back(rows_.size() + copies.size());
      order.push_back(static_cast<int64_t>(begun[i]));
      copies.push_back({row.job, std::move(answer), row.prompt, row.salt, row.seen});
    }
  }
  if (!copies.empty()) {
    memory_->keep(order);
    z = z.index_select(0, torch::tensor(sources, torch::kInt64));
  }
  for (Row& copy : copies) rows_.push_back(std::move(copy));
  draw(drawn, z);
}

/// The next token of each of `rows` from its logits [n, V].
void Engine::draw(const std::vector<size_t>& rows, torch::Tensor logits) {
  struct Drawn {
    int64_t token = -1;
    std::optional<TokenLogprob> logprob;
    std::exception_ptr error;
  };
  std::vector<Drawn> drawn(rows.size());
  at::parallel_for(0, std::ssize(rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      try {
        const std::span<float> own(logits.data_ptr<float>() + i * logits.size(1), static_cast<size_t>(logits.size(1)));
        std::tie(drawn[i].token, drawn[i].logprob) = rows_[rows[i]].answer->draw(own);
      } catch (...) {
        drawn[i].error = std::current_exception();
      }
    }
  });
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows_[rows[i]];
    row.used = clock_;
    if (row.job->gone) continue;
    if (drawn[i].error) {
      fail({rows[i]}, drawn[i].error);
      continue;
    }
    Piece piece = row.answer->take(drawn[i].token);
    piece.logprob = std::move(drawn[i].logprob);
    row.ended = !piece.finish_reason.empty();
    if (!row.ended) row.next = drawn[i].token;
    const bool wanted = row.job->listener->more(row.answer->index(), std::move(piece));
    if (!wanted) row.ended = true;
    if (row.ended) row.next.reset();
  }
}

}  // namespace moesaic::generate
