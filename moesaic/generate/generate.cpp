#include "moesaic/generate/generate.h"

#include <algorithm>

#include "moesaic/base/check.h"
#include "moesaic/generate/beam_search.h"
#include "moesaic/generate/engine.h"
#include "moesaic/generate/sampling.h"
#include "moesaic/generate/stop.h"
#include "moesaic/models/finite.h"

namespace moesaic::generate {
namespace {

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

/// Puts the pieces of all requests' answers together.
class Collector : public Listener {
 public:
  /// `first`: the number of the first answer among all.
  Collector(int64_t first, int64_t answers, const StreamCallback& stream)
      : results(answers), first_(first), stream_(stream) {}

  void began(int64_t tokens, std::vector<TokenLogprob>) override { reused = tokens; }
  bool more(int64_t answer, Piece piece) override {
    Generation& result = results[answer];
    result.ids.push_back(piece.id);
    result.text += piece.text;
    result.finish_reason = piece.finish_reason;
    const bool wanted = piece.text.empty() || !stream_ || stream_(first_ + answer, piece.text);
    if (!wanted) result.finish_reason = "stop";
    return wanted;
  }
  void failed(std::exception_ptr error) override { this->error = error; }

  std::vector<Generation> results;
  int64_t reused = 0;
  std::exception_ptr error;

 private:
  int64_t first_;
  const StreamCallback& stream_;
};

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
  if (options.num_beams > 1) {
    std::vector<int64_t> sequences(prompts.size());
    std::iota(sequences.begin(), sequences.end(), 0);
    const std::unique_ptr<models::Memory> memory = model.memory(std::ssize(prompts));
    Texts texts(model, *memory, hooks.routing);
    const torch::Tensor logits = texts.run(text, sequences);
    std::vector<std::vector<int64_t>> continued;
    for (const Prompt& prompt : prompts) continued.push_back(model.continued(prompt.ids));
    return search(texts, logits, std::move(continued), tokenizer, options);
  }
  Engine engine(model, tokenizer, {.routing = hooks.routing});
  std::vector<std::shared_ptr<Collector>> collectors;
  SamplingOptions own = options;
  for (const Prompt& prompt : prompts) {
    const int64_t first = std::ssize(collectors) * options.num_return_sequences;
    collectors.push_back(std::make_shared<Collector>(first, options.num_return_sequences, hooks.stream));
    engine.submit({prompt, own}, collectors.back());
    ++own.first;
  }
  while (engine.step()) {
  }
  std::vector<Generation> results;
  for (const auto& collector : collectors) {
    if (collector->error) std::rethrow_exception(collector->error);
    for (Generation& answer : collector->results) results.push_back(std::move(answer));
  }
  return results;
}

Session::Session(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer)
    : engine_(std::make_unique<Engine>(model, tokenizer, EngineOptions{.kept = 1, .alike = false})) {}

Session::~Session() = default;

Generation Session::answer(const Prompt& prompt, const SamplingOptions& options, const StreamCallback& stream) {
  validate(options);
  MOESAIC_CHECK(options.num_beams == 1 && options.num_return_sequences == 1, UsageError,
                "a conversation: got num_beams {} and num_return_sequences {}, expected 1: it goes on from one answer "
                "as it was written",
                options.num_beams, options.num_return_sequences);
  const auto collector = std::make_shared<Collector>(0, 1, stream);
  engine_->submit({prompt, options}, collector);
  while (engine_->step()) {
  }
  if (collector->error) std::rethrow_exception(collector->error);
  reused_ = collector->reused;
  return std::move(collector->results[0]);
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
