// From one row of logits to one token: the filters of transformers' logits processors, in their order and definition.
#pragma once
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "moesaic/generate/generate.h"

namespace moesaic::generate {

/// z_t / penalty where z_t > 0, z_t * penalty where z_t < 0, once for every token t that occurs in `seen`.
/// Source: arXiv 1909.05858; transformers' RepetitionPenaltyLogitsProcessor.
void apply_repetition_penalty(std::span<float> logits, const std::vector<int64_t>& seen, double penalty);
/// z_t - frequency * (times that t occurs in `answer`) - presence, for every t that does. Source: OpenAI's API
/// reference.
void apply_penalties(std::span<float> logits, std::span<const int64_t> answer, double frequency, double presence);
/// Keeps logits that are at least the k-th largest (ties stay), -inf elsewhere.
void apply_top_k(std::span<float> logits, int64_t k);
/// Keeps the smallest set of most probable tokens whose probabilities sum to at least p, -inf elsewhere; one at least.
/// Source: arXiv 1904.09751.
void apply_top_p(std::span<float> logits, double p);
/// Keeps tokens at least min_p times as probable as the most probable one, -inf elsewhere. Source: arXiv 2407.01082.
void apply_min_p(std::span<float> logits, double min_p);

/// What a draw is made from: the temperature, then top_k, top_p and min_p of `options`.
void apply_filters(std::span<float> logits, const SamplingOptions& options);

/// Throws UsageError, naming every option that is out of range or without effect beside the others.
void validate(const SamplingOptions& options);

/// Throws DataError unless `finite`: what a model's logits behind `tokens` tokens must be.
void check_logits(bool finite, size_t tokens);

/// One sequence's source of tokens. The draw is the same on every machine with the same logits.
class Sampler {
 public:
  Sampler(const SamplingOptions& options, uint64_t seed) : options_(options), random_(seed) {}
  /// The next token after `seen`, of which the first `prompt` are what the answer goes on; changes `logits`. Greedy
  /// ties go to the smallest id. Throws DataError when no logit is finite, UsageError when logit_bias leaves none.
  int64_t next(std::span<float> logits, const std::vector<int64_t>& seen, int64_t prompt);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace moesaic::generate
