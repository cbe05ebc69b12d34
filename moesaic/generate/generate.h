// Text generation over a language model with a memory.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/models/language_model.h"
#include "moesaic/tokenizer/grammar.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::generate {

struct SamplingOptions {
  int64_t max_new_tokens = 256;                          // an answer ends here at the latest
  double temperature = 0.0;                              // 0 = greedy
  int64_t top_k = 0;                                     // 0 = off
  double top_p = 1.0;                                    // the likeliest tokens of this mass; 1 = all
  double min_p = 0.0;                                    // tokens of at least this share of the likeliest; 0 = all
  double repetition_penalty = 1.0;                       // transformers' definition, over prompt and answer
  std::vector<std::string> stop{};                       // stop strings; cut from the answer
  std::vector<int64_t> eos_ids{};                        // end an answer
  int64_t num_beams = 1;                                 // above 1: beam search (BeamSearch)
  double length_penalty = 1.0;                           // of beams: above 0 favours long answers
  std::string early_stopping = "false";                  // of beams: false | true | never
  int64_t num_return_sequences = 1;                      // answers to each prompt: the best beams, or as many draws
  uint64_t seed = 0;                                     // of the sampling
  int64_t first = 0;                                     // number of the first prompt among all of this seed
  int64_t min_new_tokens = 0;                            // no eos_ids before
  double frequency_penalty = 0;                          // taken from a token's logit for each time the answer holds it
  double presence_penalty = 0;                           // taken once from each token that the answer holds
  std::vector<std::pair<int64_t, double>> logit_bias{};  // added to tokens' logits; -infinity forbids
  bool include_stop = false;                             // the stop string found stays in the answer
  std::shared_ptr<const tokenizer::Grammar> grammar{};   // what answers may hold; null = anything
};

/// What is asked, and with which adapters.
struct Prompt {
  std::vector<int64_t> ids;       // at least one
  std::vector<float> sentence{};  // for routers that read sentence vectors of a data column
  std::vector<double> mixture{};  // a weight per attached adapter (LanguageModel::column); empty = all 1

  bool operator==(const Prompt&) const = default;
};

/// Prompts side by side as a model reads them; every prompt's end is a border.
/// Throws UsageError for a prompt without tokens, for sentence vectors that only some prompts have or that differ in
/// length, and for weights of other than all attached adapters; each message names the prompt.
models::Text text_of(const models::LanguageModel& model, const std::vector<Prompt>& prompts);

struct Generation {
  std::vector<int64_t> ids;   // without the prompt; EOS included when it ended the answer
  std::string text;           // without EOS and stop string
  std::string finish_reason;  // stop | length
  float score = 0;            // of a beam: log p / tokens^length_penalty, transformers' sequences_scores
};

/// Called with each new piece of text of answer `index`. Return false to stop that answer.
using StreamCallback = std::function<bool(int64_t index, const std::string& piece)>;

/// Called after each forward pass with what every router decided in it. `sequences`: of which prompt each sequence of
/// the pass is, in its order.
using RoutingCallback =
    std::function<void(const std::vector<nn::RoutingRecord>& records, const std::vector<int64_t>& sequences)>;

/// Who watches.
struct Hooks {
  StreamCallback stream{};    // gets text as it comes
  RoutingCallback routing{};  // gets what routers decided
};

/// Answers every prompt, num_return_sequences times, prompt by prompt; sequences leave the batch as they finish. A
/// prompt is computed once for all its answers and beams. An answer does not depend on its neighbours: each has its own
/// generator by seed and number, its own sentence vectors and adapter weights.
/// Throws UsageError as text_of does, for impossible options and for a stream of beams, DataError when the logits are
/// not finite.
std::vector<Generation> generate(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<Prompt>& prompts, const SamplingOptions& options,
                                 const Hooks& hooks = {});

class Engine;

/// One conversation whose memory is kept from answer to answer.
class Session {
 public:
  Session(models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer);
  ~Session();
  /// Answers `prompt`, the whole conversation so far. Only what differs from the tokens already seen is computed; other
  /// sentence vectors or adapter weights than last time make everything before worthless and it is computed again.
  Generation answer(const Prompt& prompt, const SamplingOptions& options, const StreamCallback& stream = nullptr);
  /// Tokens of the last prompt that were not computed again.
  int64_t reused() const { return reused_; }

 private:
  std::unique_ptr<Engine> engine_;
  int64_t reused_ = 0;
};

/// log p(ids[i+1] | ids[0..i]) in float32, one vector per prompt.
std::vector<std::vector<float>> score(models::LanguageModel& model, const std::vector<Prompt>& prompts);
/// log p(answer[i] | prompt, answer[0..i)) in float32, one vector per prompt and its answer.
std::vector<std::vector<float>> score(models::LanguageModel& model, const std::vector<Prompt>& prompts,
                                      const std::vector<std::vector<int64_t>>& answers);

}  // namespace moesaic::generate
