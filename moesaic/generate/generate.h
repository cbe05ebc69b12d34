// Text generation over a causal model with a KV cache.
#pragma once
#include <functional>
#include <memory>

#include "moesaic/compose/composition.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::generate {

struct SamplingOptions {
  int64_t max_new_tokens = 256;
  double temperature = 0.0;  // 0 = greedy
  int64_t top_k = 0;         // 0 = off
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;  // transformers' definition, over prompt and answer
  std::vector<std::string> stop{};  // stop strings; cut from the answer
  std::vector<int64_t> eos_ids{};
  uint64_t seed = 0;
};

struct Generation {
  std::vector<int64_t> ids;   // without the prompt; EOS included when it ended the answer
  std::string text;           // without EOS and stop string
  std::string finish_reason;  // stop | length
};

/// Called with each new piece of text of sequence `index`. Return false to stop that sequence.
using StreamCallback = std::function<bool(int64_t index, const std::string& piece)>;

/// Called after each forward pass with what every router decided in it. `sequences` are the sequences of the pass, in
/// its order.
using RoutingCallback =
    std::function<void(const std::vector<nn::RoutingRecord>& records, const std::vector<int64_t>& sequences)>;

/// Answers every prompt; sequences leave the batch as they finish. A sequence's answer does not depend on its
/// neighbours: each has its own generator seeded with seed + index.
/// sentence: [B, d_e] for adapters with router input `sentence`, or undefined.
/// Throws UsageError for an empty prompt or impossible options, DataError when the logits are not finite.
std::vector<Generation> generate(models::CausalLM& model, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                 const StreamCallback& stream = nullptr, const torch::Tensor& sentence = {},
                                 const RoutingCallback& routing = nullptr);

/// The same with a composition; `tokenizer` is the anchor's. Every prompt's end is a border (compose::Borders).
std::vector<Generation> generate(compose::Composition& composition, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                 const StreamCallback& stream = nullptr);

/// One conversation whose keys and values are kept from answer to answer.
class Session {
 public:
  Session(models::CausalLM& model, const tokenizer::Tokenizer& tokenizer);
  Session(compose::Composition& composition, const tokenizer::Tokenizer& tokenizer);
  ~Session();
  /// Answers `prompt`, the whole conversation so far. Only what differs from the tokens already seen is computed; other
  /// `sentence` vectors than last time make everything before worthless and it is computed again.
  Generation answer(const std::vector<int64_t>& prompt, const SamplingOptions& options,
                    const StreamCallback& stream = nullptr, const torch::Tensor& sentence = {});
  /// Tokens of the last prompt that were not computed again.
  int64_t reused() const { return reused_; }

 private:
  struct Impl;
  const tokenizer::Tokenizer& tokenizer_;
  std::unique_ptr<Impl> impl_;
  std::vector<int64_t> seen_;  // the tokens whose keys and values are cached
  torch::Tensor sentence_;
  int64_t reused_ = 0;
};

/// log p(ids[i+1] | ids[0..i]) in float32, one vector per sequence.
std::vector<std::vector<float>> score(models::CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
                                      const torch::Tensor& sentence = {});

/// log softmax(head(hidden_m))[target_m] in float32 for rows of final-norm hidden states [M, d]; targets: [M] int64.
/// Logits are made in chunks of rows, never whole. is_greedy, when given, becomes [M] bool: the target is the argmax.
torch::Tensor target_logprobs(const models::CausalLM& model, const torch::Tensor& hidden, const torch::Tensor& targets,
                              torch::Tensor* is_greedy = nullptr);

}  // namespace moesaic::generate
