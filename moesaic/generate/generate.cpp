#include "moesaic/generate/generate.h"

#include <algorithm>
#include <span>

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/generate/beam_search.h"
#include "moesaic/generate/sampling.h"
#include "moesaic/generate/stop.h"
#include "moesaic/models/finite.h"

namespace moesaic::generate {
namespace {

/// The tokenizer outlives a call; the decoder wants shared ownership.
std::shared_ptr<const tokenizer::Tokenizer> borrow(const tokenizer::Tokenizer& tokenizer) {
  return {std::shared_ptr<const void>(), &tokenizer};
}

/// One answer in the making.
class Answer {
 public:
  Answer(int64_t index, std::vector<int64_t> seen, const tokenizer::Tokenizer& tokenizer,
         const SamplingOptions& options)
      : index_(index),
        seen_(std::move(seen)),
        options_(options),
        sampler_(options, derive_seed(options.seed, "answer",
                                      static_cast<uint64_t>(options.first * options.num_return_sequences + index))),
        decoder_(borrow(tokenizer)),
        stops_(options.stop) {}

  int64_t prompt() const { return index_ / options_.num_return_sequences; }
  bool done() const { return !result_.finish_reason.empty(); }
  Generation take() { return std::move(result_); }

  /// Draws the next token from `logits` [V] and returns it.
  int64_t step(std::span<float> logits, const StreamCallback& stream) {
    const int64_t token = sampler_.next(logits, seen_);
    seen_.push_back(token);
    result_.ids.push_back(token);
    if (std::find(options_.eos_ids.begin(), options_.eos_ids.end(), token) != options_.eos_ids.end()) {
      finish("stop", stream);
      return token;
    }
    const bool wanted = show(stops_.push(decoder_.push(token)), stream);
    if (!wanted || stops_.found()) {
      result_.finish_reason = "stop";
    } else if (static_cast<int64_t>(result_.ids.size()) >= options_.max_new_tokens) {
      finish("length", stream);
    }
    return token;
  }

 private:
  bool show(const std::string& piece, const StreamCallback& stream) {
    result_.text += piece;
    return piece.empty() || !stream || stream(index_, piece);
  }
  void finish(const char* reason, const StreamCallback& stream) {
    show(stops_.push(decoder_.finish()), stream);
    show(stops_.finish(), stream);
    result_.finish_reason = stops_.found() ? "stop" : reason;
  }

  int64_t index_;              // among the answers to all prompts
  std::vector<int64_t> seen_;  // what the answer goes on, and the answer
  const SamplingOptions& options_;
  Sampler sampler_;
  tokenizer::StreamDecoder decoder_;
  StopStrings stops_;
  Generation result_;
};

/// The last row of every sequence; undefined when there are no others.
torch::Tensor last_rows(const nn::RaggedBatch& batch) {
  if (batch.num_tokens() == batch.batch_size()) return {};
  const std::vector<int64_t> ends(batch.offsets.begin() + 1, batch.offsets.end());
  return (torch::tensor(ends, torch::kInt64) - 1).to(batch.tokens.device());
}

/// A model in the middle of texts.
class Texts {
 public:
  Texts(models::LanguageModel& model, models::Memory& memory, RoutingCallback routing)
      : model_(model), memory_(memory), routing_(std::move(routing)) {}

  /// Runs `text` behind what was seen and returns the logits of every sequence's last row, [B, V] float32 on the CPU.
  /// `sequences`: which of the prompts these are.
  torch::Tensor run(models::Text text, const std::vector<int64_t>& sequences) {
    text.rows = last_rows(text.tokens);
    std::vector<nn::RoutingRecord> records;
    nn::Pass pass;
    if (routing_) pass.routing = &records;
    const torch::Tensor hidden = model_.hidden(text, pass, &memory_);
    if (routing_) routing_(records, sequences);
    return model_.head().logits(hidden).to(torch::kCPU).contiguous();
  }
  /// One more token of each sequence.
  torch::Tensor run(const std::vector<std::vector<int64_t>>& tokens, const std::vector<int64_t>& sequences) {
    return run(models::Text{nn::RaggedBatch::from_sequences(tokens, model_.facts().device)}, sequences);
  }
  void keep(const std::vector<int64_t>& rows) { memory_.keep(rows); }

 private:
  models::LanguageModel& model_;
  models::Memory& memory_;
  RoutingCallback routing_;
};

/// Draws tokens for `live` until all are done. `texts` has seen everything but `logits`' next tokens. With one answer
/// it is kept as it is at the end, without the last token.
void decode(Texts& texts, std::vector<Answer*> live, torch::Tensor logits, const StreamCallback& stream) {
  while (true) {
    std::vector<std::vector<int64_t>> tokens;
    std::vector<int64_t> kept, sequences;
    std::vector<Answer*> next;
    for (size_t row = 0; row < live.size(); ++row) {
      const std::span<float> values(logits[static_cast<int64_t>(row)].data_ptr<float>(), logits.size(1));
      const int64_t token = live[row]->step(values, stream);
      if (live[row]->done()) continue;
      tokens.push_back({token});
      kept.push_back(static_cast<int64_t>(row));
      sequences.push_back(live[row]->prompt());
      next.push_back(live[row]);
    }
    if (next.empty()) return;
    if (next.size() < live.size()) {
      texts.keep(kept);
      live = next;
    }
    logits = texts.run(tokens, sequences);
  }
}

/// A finished beam.
Generation generation_of(const Hypothesis& answer, const tokenizer::Tokenizer& tokenizer,
                         const SamplingOptions& options) {
  std::vector<int64_t> shown = answer.ids;
  const std::vector<int64_t>& eos = options.eos_ids;
  if (std::find(eos.begin(), eos.end(), shown.back()) != eos.end()) shown.pop_back();
  StopStrings stops(options.stop);
  std::string text = stops.push(tokenizer.decode(shown, /*skip_special_tokens=*/true));
  text += stops.finish();
  return {answer.ids, std::move(text), answer.stopped ? "stop" : "length", answer.score};
}

/// Throws UsageError where a beam search can't be.
void check_beams(const models::LanguageModel& model, const SamplingOptions& options, const Hooks& hooks) {
  MOESAIC_CHECK(!hooks.stream, UsageError,
                "num_beams: got {} with a stream, expected 1: which beam is the answer is known at its end",
                options.num_beams);
  const int64_t candidates = options.num_beams * (std::ssize(options.eos_ids) + 1);
  MOESAIC_CHECK(
      candidates <= model.facts().vocab_size, UsageError,
      "num_beams: got {} with {} end-of-text tokens, expected so few that {} candidates fit the vocabulary of "
      "{}",
      options.num_beams, options.eos_ids.size(), candidates, model.facts().vocab_size);
}

/// Searches the answers to all prompts together, a row for each running hypothesis. `texts` has seen the prompts, and
/// `logits` are their next tokens; `continued`: the texts that answers go on.
std::vector<Generation> search(Texts& texts, torch::Tensor logits, std::vector<std::vector<int64_t>> continued,
                               const tokenizer::Tokenizer& tokenizer, const SamplingOptions& options) {
  BeamSearch::Stops stops;
  if (!options.stop.empty()) {
    stops = [&](const std::vector<int64_t>& ids) {
      StopStrings found(options.stop);
      found.push(tokenizer.decode(ids, /*skip_special_tokens=*/true));
      return found.found();
    };
  }
  std::vector<BeamSearch> searches;
  for (std::vector<int64_t>& text : continued) searches.emplace_back(options, std::move(text), stops);
  std::vector<int64_t> live(searches.size());
  std::iota(live.begin(), live.end(), 0);
  while (true) {
    const torch::Tensor log_probs = at::log_softmax(logits, 1);
    std::vector<std::vector<int64_t>> tokens;
    std::vector<int64_t> kept, sequences, next;
    int64_t row = 0;
    for (const int64_t prompt : live) {
      BeamSearch& beams = searches[prompt];
      const int64_t rows = std::ssize(beams.running());
      beams.step(log_probs.narrow(0, row, rows));
      if (!beams.done()) {
        next.push_back(prompt);
        for (const Hypothesis& hypothesis : beams.running()) {
          tokens.push_back({hypothesis.ids.back()});
          kept.push_back(row + hypothesis.parent);
          sequences.push_back(prompt);
        }
      }
      row += rows;
    }
    if (next.empty()) break;
    live = std::move(next);
    texts.keep(kept);
    logits = texts.run(tokens, sequences);
  }
  std::vector<Generation> results;
  for (const BeamSearch& beams : searches) {
    for (int64_t i = 0; i < options.num_return_sequences; ++i) {
      results.push_back(generation_of(beams.answers().at(i), tokenizer, options));
    }
  }
  return results;
}

/// One row per prompt of what prompts may leave out, or undefined when all do. `rest` is what a prompt without has.
template <class T>
torch::Tensor rows_of(const std::vector<Prompt>& prompts, std::vector<T> Prompt::* member, const std::vector<T>& rest) {
  std::vector<torch::Tensor> rows;
  bool given = false;
  for (const Prompt& prompt : prompts) {
    const std::vector<T>& own = prompt.*member;
    given = given || !own.empty();
    rows.push_back(torch::tensor(own.empty() ? rest : own, torch::kFloat32));
  }
  return given ? torch::stack(rows) : torch::Tensor();
}

}  // namespace

models::Text text_of(const models::LanguageModel& model, const std::vector<Prompt>& prompts) {
  const size_t adapters = model.attachments().size();
  std::vector<std::vector<int64_t>> sequences;
  models::Text text;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Prompt& prompt = prompts[i];
    MOESAIC_CHECK(!prompt.ids.empty(), UsageError, "prompt {}: it has no tokens. Give at least one word.", i);
    MOESAIC_CHECK(prompt.sentence.size() == prompts[0].sentence.size(), UsageError,
                  "prompt {}: its sentence vector has {} numbers, expected {} as the first one's", i,
                  prompt.sentence.size(), prompts[0].sentence.size());
    MOESAIC_CHECK(prompt.mixture.empty() || prompt.mixture.size() == adapters, UsageError,
                  "prompt {}: its mixture has {} weights, expected {}: one of every attached adapter", i,
                  prompt.mixture.size(), adapters);
    sequences.push_back(prompt.ids);
    text.borders.push_back({std::ssize(prompt.ids)});
  }
  text.tokens = nn::RaggedBatch::from_sequences(sequences, model.facts().device);
  text.sentence = rows_of(prompts, &Prompt::sentence, {});
  text.mixture = rows_of(prompts, &Prompt::mixture, std::vector<double>(adapters, 1.0));
  return text;
}

std::vector<Generation> generate(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<Prompt>& prompts, const SamplingOptions& options,
                                 const Hooks& hooks) {
  validate(options);
  if (options.num_beams > 1) check_beams(model, options, hooks);
  if (prompts.empty()) return {};
  torch::NoGradGuard no_grad;
  const models::Text text = text_of(model, prompts);
  std::vector<int64_t> sequences(prompts.size());
  std::iota(sequences.begin(), sequences.end(), 0);
  const std::unique_ptr<models::Memory> memory = model.memory(std::ssize(prompts));
  Texts texts(model, *memory, hooks.routing);
  torch::Tensor logits = texts.run(text, sequences);
  std::vector<std::vector<int64_t>> continued;
  for (const Prompt& prompt : prompts) continued.push_back(model.continued(prompt.ids));
  if (options.num_beams > 1) return search(texts, logits, std::move(continued), tokenizer, options);
  std::vector<Answer> answers;
  std::vector<Answer*> live;
  std::vector<int64_t> rows;
  answers.reserve(prompts.size() * options.num_return_sequences);
  for (const int64_t b : sequences) {
    for (int64_t i = 0; i < options.num_return_sequences; ++i) {
      rows.push_back(b);
      live.push_back(&answers.emplace_back(std::ssize(answers), continued[b], tokenizer, options));
    }
  }
  if (rows.size() > sequences.size()) {
    texts.keep(rows);
    logits = logits.index_select(0, torch::tensor(rows, torch::kInt64));
  }
  decode(texts, live, logits, hooks.stream);
  std::vector<Generation> results;
  for (Answer& answer : answers) results.push_back(answer.take());
  return results;
}

Session::Session(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer)
    : model_(model), tokenizer_(tokenizer), memory_(model.memory(1)) {}

Generation Session::answer(const Prompt& prompt, const SamplingOptions& options, const StreamCallback& stream) {
  validate(options);
  MOESAIC_CHECK(options.num_beams == 1 && options.num_return_sequences == 1, UsageError,
                "a conversation: got num_beams {} and num_return_sequences {}, expected 1: it goes on from one answer "
                "as it was written",
                options.num_beams, options.num_return_sequences);
  torch::NoGradGuard no_grad;
  models::Text text = text_of(model_, {prompt});
  // Sentence embeddings of the model are those of the whole prompt.
  const bool embedded = model_.needs().sentence == nn::Needs::Sentence::kHidden;
  reused_ = 0;
  if (prompt.sentence == last_.sentence && prompt.mixture == last_.mixture && (!embedded || prompt.ids == last_.ids)) {
    const auto differ = std::mismatch(prompt.ids.begin(), prompt.ids.end(), seen_.begin(), seen_.end()).first;
    // The last token is always computed: its logits are what comes next.
    reused_ = std::min<int64_t>(differ - prompt.ids.begin(), std::ssize(prompt.ids) - 1);
  }
  if (std::max(prompt.ids.size(), seen_.size()) > static_cast<uint64_t>(model_.exact_memory())) reused_ = 0;
  last_ = prompt;
  if (reused_ > 0) {
    memory_->truncate(0, reused_);
    reused_ = memory_->length(0);
  }
  if (reused_ == 0) memory_ = model_.memory(1);  // without the last prompt's vectors and weights
  seen_.resize(reused_);
  text.tokens =
      nn::RaggedBatch::from_sequences({{prompt.ids.begin() + reused_, prompt.ids.end()}}, model_.facts().device);
  Texts texts(model_, *memory_, nullptr);
  Answer answer(0, model_.continued(prompt.ids), tokenizer_, options);
  decode(texts, {&answer}, texts.run(text, {0}), stream);
  Generation result = answer.take();
  seen_ = prompt.ids;
  seen_.insert(seen_.end(), result.ids.begin(), result.ids.end());
  seen_.resize(memory_->length(0));
  return result;
}

namespace {

/// log p of the tokens from number first[b] on of each sequence of `text`.
std::vector<std::vector<float>> log_probs_from(models::LanguageModel& model, models::Text text,
                                               const std::vector<int64_t>& first) {
  std::vector<std::vector<float>> scores(first.size());
  std::vector<int64_t> rows;
  for (size_t b = 0; b < first.size(); ++b) {
    for (int64_t n = text.tokens.offsets[b] + first[b]; n < text.tokens.offsets[b + 1]; ++n) rows.push_back(n);
  }
  if (rows.empty()) return scores;
  const torch::Tensor scored = torch::tensor(rows, torch::kInt64).to(model.facts().device);
  text.rows = scored - 1;
  nn::Pass pass;
  const torch::Tensor log_probs =
      model.head().log_probs(model.hidden(text, pass), text.tokens.tokens.index_select(0, scored)).to(torch::kCPU);
  models::check_figures(log_probs, model, text);
  const float* next = log_probs.data_ptr<float>();
  for (size_t b = 0; b < first.size(); ++b) {
    const int64_t count = std::max<int64_t>(text.tokens.offsets[b + 1] - text.tokens.offsets[b] - first[b], 0);
    scores[b].assign(next, next + count);
    next += count;
  }
  return scores;
}

}  // namespace

std::vector<std::vector<float>> score(models::LanguageModel& model, const std::vector<Prompt>& prompts) {
  if (prompts.empty()) return {};
  torch::NoGradGuard no_grad;
  return log_probs_from(model, text_of(model, prompts), std::vector<int64_t>(prompts.size(), 1));
}

std::vector<std::vector<float>> score(models::LanguageModel& model, const std::vector<Prompt>& prompts,
                                      const std::vector<std::vector<int64_t>>& answers) {
  MOESAIC_CHECK(prompts.size() == answers.size(), UsageError, "score: got {} prompts and {} answers", prompts.size(),
                answers.size());
  if (prompts.empty()) return {};
  torch::NoGradGuard no_grad;
  std::vector<Prompt> whole = prompts;
  for (size_t i = 0; i < whole.size(); ++i) {
    whole[i].ids.insert(whole[i].ids.end(), answers[i].begin(), answers[i].end());
  }
  models::Text text = text_of(model, whole);
  std::vector<int64_t> first;
  for (size_t i = 0; i < prompts.size(); ++i) {
    MOESAIC_CHECK(!prompts[i].ids.empty(), UsageError, "prompt {}: it has no tokens. Give at least one word.", i);
    first.push_back(std::ssize(prompts[i].ids));
    text.borders[i] = {first.back()};
    text.prompts.push_back(prompts[i].ids);
  }
  return log_probs_from(model, std::move(text), first);
}

}  // namespace moesaic::generate
