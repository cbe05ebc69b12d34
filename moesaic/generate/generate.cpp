#include "moesaic/generate/generate.h"

#include "moesaic/base/check.h"
#include "moesaic/generate/sampling.h"
#include "moesaic/generate/stop.h"

namespace moesaic::generate {
namespace {

/// The tokenizer outlives a call; the decoder wants shared ownership.
std::shared_ptr<const tokenizer::Tokenizer> borrow(const tokenizer::Tokenizer& tokenizer) {
  return {std::shared_ptr<const void>(), &tokenizer};
}

/// One answer in the making.
class Answer {
 public:
  Answer(int64_t index, std::vector<int64_t> prompt, const tokenizer::Tokenizer& tokenizer,
         const SamplingOptions& options)
      : index_(index),
        seen_(std::move(prompt)),
        options_(options),
        sampler_(options, options.seed + static_cast<uint64_t>(index)),
        decoder_(borrow(tokenizer)),
        stops_(options.stop) {}

  int64_t index() const { return index_; }
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

  int64_t index_;
  std::vector<int64_t> seen_;  // prompt and answer
  const SamplingOptions& options_;
  Sampler sampler_;
  tokenizer::StreamDecoder decoder_;
  StopStrings stops_;
  Generation result_;
};

torch::Tensor to_index(const std::vector<int64_t>& values, torch::Device device) {
  return torch::tensor(values, torch::kInt64).to(device);
}

/// The last row of every sequence of hidden [N, d].
torch::Tensor last_rows(const torch::Tensor& hidden, const nn::RaggedBatch& batch) {
  if (batch.num_tokens() == batch.batch_size()) return hidden;
  std::vector<int64_t> last;
  for (int64_t b = 0; b < batch.batch_size(); ++b) last.push_back(batch.offsets[b + 1] - 1);
  return hidden.index_select(0, to_index(last, hidden.device()));
}

/// A model in the middle of texts, with all it has cached of them.
class Texts {
 public:
  virtual ~Texts() = default;
  /// Runs `batch` behind what was seen and returns the logits of every sequence's last row, [B, V] float32 on the CPU.
  /// `sequences`: which of the prompts these are.
  virtual torch::Tensor run(const nn::RaggedBatch& batch, const std::vector<int64_t>& sequences) = 0;
  /// Keeps the sequences `rows`.
  virtual void select(const std::vector<int64_t>& rows) = 0;
  virtual int64_t length(int64_t b) const = 0;
  virtual void truncate(int64_t b, int64_t length) = 0;
  virtual models::CausalLM& model() const = 0;
};

class ModelTexts : public Texts {
 public:
  ModelTexts(models::CausalLM& model, int64_t batch_size, torch::Tensor sentence, const RoutingCallback& routing)
      : model_(model), cache_(model.make_cache(batch_size)), sentence_(std::move(sentence)), routing_(routing) {}

  torch::Tensor run(const nn::RaggedBatch& batch, const std::vector<int64_t>& sequences) override {
    std::vector<nn::RoutingRecord> records;
    nn::ForwardContext context;
    context.cache = &cache_;
    context.sentence = sentence_;
    if (routing_) context.routing = &records;
    const torch::Tensor hidden = last_rows(model_.hidden_states(batch, context), batch);
    if (routing_) routing_(records, sequences);
    return model_.logits(hidden).to(torch::kCPU).contiguous();
  }
  void select(const std::vector<int64_t>& rows) override {
    cache_ = cache_.select(rows);
    if (sentence_.defined()) sentence_ = sentence_.index_select(0, to_index(rows, sentence_.device()));
  }
  int64_t length(int64_t b) const override { return cache_.length(b); }
  void truncate(int64_t b, int64_t length) override { cache_.truncate(b, length); }
  models::CausalLM& model() const override { return model_; }
  void set_sentence(torch::Tensor sentence) { sentence_ = std::move(sentence); }

 private:
  models::CausalLM& model_;
  nn::KvCache cache_;
  torch::Tensor sentence_;
  RoutingCallback routing_;
};

/// The first batch after construction or truncation ends with its prompts.
class ComposedTexts : public Texts {
 public:
  ComposedTexts(compose::Composition& composition, int64_t batch_size)
      : composition_(composition), state_(composition.make_state(batch_size)) {}

  torch::Tensor run(const nn::RaggedBatch& batch, const std::vector<int64_t>&) override {
    compose::Borders borders;
    if (at_prompt_) {
      for (int64_t b = 0; b < batch.batch_size(); ++b) {
        borders.push_back({length(b) + batch.offsets[b + 1] - batch.offsets[b]});
      }
    }
    at_prompt_ = false;
    nn::ForwardContext context;
    const torch::Tensor hidden = composition_.hidden_states(batch, borders, context, &state_);
    return model().logits(last_rows(hidden, batch)).to(torch::kCPU).contiguous();
  }
  void select(const std::vector<int64_t>& rows) override { state_ = state_.select(rows); }
  int64_t length(int64_t b) const override { return state_.anchor.length(b); }
  void truncate(int64_t b, int64_t length) override {
    state_.truncate(b, length);
    at_prompt_ = true;
  }
  models::CausalLM& model() const override { return composition_.anchor(); }

 private:
  compose::Composition& composition_;
  compose::CompositionState state_;
  bool at_prompt_ = true;
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
      sequences.push_back(live[row]->index());
      next.push_back(live[row]);
    }
    if (next.empty()) return;
    if (next.size() < live.size()) {
      texts.select(kept);
      live = next;
    }
    logits = texts.run(nn::RaggedBatch::from_sequences(tokens, texts.model().device()), sequences);
  }
}

void check_prompt(const std::vector<int64_t>& prompt, size_t index, int64_t vocab_size) {
  MOESAIC_CHECK(!prompt.empty(), UsageError, "prompt {}: it has no tokens. Give at least one word.", index);
  for (int64_t id : prompt) {
    MOESAIC_CHECK(id >= 0 && id < vocab_size, DataError,
                  "prompt {}: token id {} is outside the model's vocabulary of {}. A tokenizer of another model?",
                  index, id, vocab_size);
  }
}

std::vector<Generation> answer_all(Texts& texts, const tokenizer::Tokenizer& tokenizer,
                                   const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                   const StreamCallback& stream) {
  torch::NoGradGuard no_grad;
  std::vector<Answer> answers;
  std::vector<Answer*> live;
  std::vector<int64_t> sequences;
  answers.reserve(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    check_prompt(prompts[i], i, texts.model().config().vocab_size);
    live.push_back(&answers.emplace_back(static_cast<int64_t>(i), prompts[i], tokenizer, options));
    sequences.push_back(static_cast<int64_t>(i));
  }
  const nn::RaggedBatch batch = nn::RaggedBatch::from_sequences(prompts, texts.model().device());
  decode(texts, live, texts.run(batch, sequences), stream);
  std::vector<Generation> results;
  for (Answer& answer : answers) results.push_back(answer.take());
  return results;
}

}  // namespace

std::vector<Generation> generate(models::CausalLM& model, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                 const StreamCallback& stream, const torch::Tensor& sentence,
                                 const RoutingCallback& routing) {
  validate(options);
  if (prompts.empty()) return {};
  ModelTexts texts(model, std::ssize(prompts), sentence, routing);
  return answer_all(texts, tokenizer, prompts, options, stream);
}

std::vector<Generation> generate(compose::Composition& composition, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                 const StreamCallback& stream) {
  validate(options);
  if (prompts.empty()) return {};
  ComposedTexts texts(composition, std::ssize(prompts));
  return answer_all(texts, tokenizer, prompts, options, stream);
}

struct Session::Impl {
  std::unique_ptr<Texts> texts;
  ModelTexts* model_texts = nullptr;  // `texts` when it is a single model's
};

Session::Session(models::CausalLM& model, const tokenizer::Tokenizer& tokenizer)
    : tokenizer_(tokenizer), impl_(std::make_unique<Impl>()) {
  auto texts = std::make_unique<ModelTexts>(model, 1, torch::Tensor(), nullptr);
  impl_->model_texts = texts.get();
  impl_->texts = std::move(texts);
}
Session::Session(compose::Composition& composition, const tokenizer::Tokenizer& tokenizer)
    : tokenizer_(tokenizer), impl_(std::make_unique<Impl>()) {
  impl_->texts = std::make_unique<ComposedTexts>(composition, 1);
}
Session::~Session() = default;

Generation Session::answer(const std::vector<int64_t>& prompt, const SamplingOptions& options,
                           const StreamCallback& stream, const torch::Tensor& sentence) {
  Texts& texts = *impl_->texts;
  validate(options);
  check_prompt(prompt, 0, texts.model().config().vocab_size);
  torch::NoGradGuard no_grad;
  const bool same_sentence =
      sentence.defined() == sentence_.defined() && (!sentence.defined() || sentence.equal(sentence_));
  reused_ = 0;
  if (same_sentence) {
    const auto differ = std::mismatch(prompt.begin(), prompt.end(), seen_.begin(), seen_.end()).first;
    // The last token is always computed: its logits are what comes next.
    reused_ = std::min<int64_t>(differ - prompt.begin(), static_cast<int64_t>(prompt.size()) - 1);
  }
  sentence_ = sentence;
  if (impl_->model_texts) impl_->model_texts->set_sentence(sentence);
  seen_.resize(reused_);
  texts.truncate(0, reused_);
  const std::vector<int64_t> rest(prompt.begin() + reused_, prompt.end());
  const nn::RaggedBatch batch = nn::RaggedBatch::from_sequences({rest}, texts.model().device());
  Answer answer(0, prompt, tokenizer_, options);
  decode(texts, {&answer}, texts.run(batch, {0}), stream);
  Generation result = answer.take();
  seen_ = prompt;
  seen_.insert(seen_.end(), result.ids.begin(), result.ids.end());
  seen_.resize(texts.length(0));
  return result;
}

torch::Tensor target_logprobs(const models::CausalLM& model, const torch::Tensor& hidden, const torch::Tensor& targets,
                              torch::Tensor* is_greedy) {
  torch::NoGradGuard no_grad;
  constexpr int64_t kLogitsPerChunk = int64_t{1} << 22;  // 16 MiB of float32
  const int64_t rows = hidden.size(0);
  const int64_t chunk = std::max<int64_t>(1, kLogitsPerChunk / model.config().vocab_size);
  torch::Tensor result = torch::empty({rows}, torch::dtype(torch::kFloat32).device(hidden.device()));
  if (is_greedy) *is_greedy = torch::empty({rows}, torch::dtype(torch::kBool).device(hidden.device()));
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(rows, begin + chunk);
    const torch::Tensor logits = model.logits(hidden.slice(0, begin, end));
    const torch::Tensor wanted = targets.slice(0, begin, end);
    const torch::Tensor picked = logits.gather(1, wanted.unsqueeze(1)).squeeze(1);
    result.slice(0, begin, end).copy_(picked - logits.logsumexp(1));
    if (is_greedy) is_greedy->slice(0, begin, end).copy_(logits.argmax(1) == wanted);
  }
  return result;
}

std::vector<std::vector<float>> score(models::CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
                                      const torch::Tensor& sentence) {
  torch::NoGradGuard no_grad;
  std::vector<std::vector<float>> scores(sequences.size());
  if (sequences.empty()) return scores;
  for (size_t i = 0; i < sequences.size(); ++i) check_prompt(sequences[i], i, model.config().vocab_size);
  const nn::RaggedBatch batch = nn::RaggedBatch::from_sequences(sequences, model.device());
  nn::ForwardContext context;
  context.sentence = sentence;
  const torch::Tensor hidden = model.hidden_states(batch, context);
  for (int64_t b = 0; b < batch.batch_size(); ++b) {
    const int64_t begin = batch.offsets[b], end = batch.offsets[b + 1];
    if (end - begin < 2) continue;
    const torch::Tensor logprobs =
        target_logprobs(model, hidden.slice(0, begin, end - 1), batch.tokens.slice(0, begin + 1, end)).to(torch::kCPU);
    scores[b].assign(logprobs.data_ptr<float>(), logprobs.data_ptr<float>() + logprobs.numel());
  }
  return scores;
}

}  // namespace moesaic::generate
