#include "moesaic/generate/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "moesaic/base/check.h"

namespace moesaic::generate {
namespace {

constexpr float kRemoved = -std::numeric_limits<float>::infinity();

/// exp(z - max z) of every logit and their sum.
std::pair<std::vector<double>, double> exponentials(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(logits.size());
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) sum += weights[i] = std::exp(logits[i] - largest);
  return {std::move(weights), sum};
}

}  // namespace

void apply_repetition_penalty(std::span<float> logits, const std::vector<int64_t>& seen, double penalty) {
  std::vector<int64_t> tokens = seen;
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  for (int64_t token : tokens) {
    float& logit = logits[token];
    logit = static_cast<float>(logit < 0 ? logit * penalty : logit / penalty);
  }
}

void apply_top_k(std::span<float> logits, int64_t k) {
  if (k >= static_cast<int64_t>(logits.size())) return;
  std::vector<float> sorted(logits.begin(), logits.end());
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
  for (float& logit : logits) {
    if (logit < sorted[k - 1]) logit = kRemoved;
  }
}

void apply_top_p(std::span<float> logits, double p) {
  auto [weights, sum] = exponentials(logits);
  std::vector<int32_t> heap(logits.size());
  std::iota(heap.begin(), heap.end(), 0);
  auto less = [&weights = weights](int32_t a, int32_t b) {
    return weights[a] != weights[b] ? weights[a] < weights[b] : a > b;
  };
  std::make_heap(heap.begin(), heap.end(), less);
  // A heap gives the nucleus, usually a few tokens, without sorting the vocabulary.
  auto end = heap.end();
  double mass = 0;
  do {
    std::pop_heap(heap.begin(), end--, less);
    mass += weights[*end] / sum;
  } while (end != heap.begin() && mass < p);
  for (auto it = heap.begin(); it != end; ++it) logits[*it] = kRemoved;
}

void apply_min_p(std::span<float> logits, double min_p) {
  // p_t < min_p * p_max  <=>  z_t < z_max + log(min_p)
  const double smallest = *std::max_element(logits.begin(), logits.end()) + std::log(min_p);
  for (float& logit : logits) {
    if (logit < smallest) logit = kRemoved;
  }
}

void validate(const SamplingOptions& options) {
  std::string wrong;
  auto expect = [&](bool ok, const char* name, double got, const char* expected) {
    if (!ok) wrong += fmt::format("\n  {}: got {}, expected {}", name, got, expected);
  };
  expect(options.max_new_tokens >= 1, "max_new_tokens", static_cast<double>(options.max_new_tokens), "1 or more");
  expect(options.temperature >= 0 && std::isfinite(options.temperature), "temperature", options.temperature,
         "0 (greedy) or more");
  expect(options.top_k >= 0, "top_k", static_cast<double>(options.top_k), "0 (off) or more");
  expect(options.top_p > 0 && options.top_p <= 1, "top_p", options.top_p, "above 0, up to 1 (off)");
  expect(options.min_p >= 0 && options.min_p <= 1, "min_p", options.min_p, "0 (off) to 1");
  expect(options.repetition_penalty > 0 && std::isfinite(options.repetition_penalty), "repetition_penalty",
         options.repetition_penalty, "above 0 (1 = off)");
  MOESAIC_CHECK(wrong.empty(), UsageError, "sampling options out of range:{}", wrong);
}

int64_t Sampler::next(std::span<float> logits, const std::vector<int64_t>& seen) {
  if (options_.repetition_penalty != 1.0) apply_repetition_penalty(logits, seen, options_.repetition_penalty);
  auto best = std::max_element(logits.begin(), logits.end());
  const bool finite =
      std::isfinite(*best) && std::none_of(logits.begin(), logits.end(), [](float z) { return std::isnan(z); });
  MOESAIC_CHECK(
      finite, DataError,
      "generation: the model's logits are not finite after {} tokens. Damaged weights, or --dtype too narrow for "
      "this model?",
      seen.size());
  if (options_.temperature == 0) return best - logits.begin();
  for (float& logit : logits) logit = static_cast<float>(logit / options_.temperature);
  if (options_.top_k > 0) apply_top_k(logits, options_.top_k);
  if (options_.top_p < 1) apply_top_p(logits, options_.top_p);
  if (options_.min_p > 0) apply_min_p(logits, options_.min_p);
  const auto [weights, sum] = exponentials(logits);
  // 53 random bits make a uniform number in [0, 1) the same way everywhere; std's distributions do not promise that.
  double left = static_cast<double>(random_() >> 11) * 0x1.0p-53 * sum;
  int64_t last = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    last = static_cast<int64_t>(i);
    left -= weights[i];
    if (left < 0) break;
  }
  return last;
}

}  // namespace moesaic::generate
