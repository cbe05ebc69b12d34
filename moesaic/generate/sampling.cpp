#include "moesaic/generate/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
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

void apply_penalties(std::span<float> logits, std::span<const int64_t> answer, double frequency, double presence) {
  std::map<int64_t, int64_t> counts;
  for (const int64_t token : answer) ++counts[token];
  for (const auto& [token, count] : counts) {
    logits[token] -= static_cast<float>(frequency * static_cast<double>(count) + presence);
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

void apply_filters(std::span<float> logits, const SamplingOptions& options) {
  for (float& logit : logits) logit = static_cast<float>(logit / options.temperature);
  if (options.top_k > 0) apply_top_k(logits, options.top_k);
  if (options.top_p < 1) apply_top_p(logits, options.top_p);
  if (options.min_p > 0) apply_min_p(logits, options.min_p);
}

void check_logits(bool finite, size_t tokens) {
  MOESAIC_CHECK(finite, DataError,
                "generation: the model's logits are not finite after {} tokens. Damaged weights, or --dtype too narrow "
                "for this model?",
                tokens);
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
  expect(options.min_new_tokens >= 0 && options.min_new_tokens <= options.max_new_tokens, "min_new_tokens",
         static_cast<double>(options.min_new_tokens), "0 to max_new_tokens");
  for (const auto& [name, value] : {std::pair("frequency_penalty", options.frequency_penalty),
                                    std::pair("presence_penalty", options.presence_penalty)}) {
    expect(value >= -2 && value <= 2, name, value, "-2 to 2 (0 = off)");
  }
  const bool beams = options.num_beams > 1;
  expect(!beams || (options.logit_bias.empty() && options.frequency_penalty == 0 && options.presence_penalty == 0 &&
                    options.min_new_tokens == 0 && options.grammar == nullptr),
         "num_beams", static_cast<double>(options.num_beams),
         "1 with logit_bias, min_new_tokens, frequency_penalty, presence_penalty or a grammar");
  expect(options.num_beams >= 1, "num_beams", static_cast<double>(options.num_beams), "1 (no beam search) or more");
  expect(!beams || options.temperature == 0, "temperature", options.temperature,
         "0 with num_beams: a beam draws nothing");
  expect(std::isfinite(options.length_penalty), "length_penalty", options.length_penalty, "a finite number");
  expect(beams || options.length_penalty == 1, "length_penalty", options.length_penalty, "1 without num_beams");
  const std::string& early = options.early_stopping;
  if (early != "false" && early != "true" && early != "never") {
    wrong += fmt::format("\n  early_stopping: got '{}', expected false, true or never", early);
  } else if (!beams && early != "false") {
    wrong += fmt::format("\n  early_stopping: got {}, expected false without num_beams", early);
  }
  const auto answers = static_cast<double>(options.num_return_sequences);
  expect(answers >= 1, "num_return_sequences", answers, "1 or more");
  expect(!beams || options.num_return_sequences <= options.num_beams, "num_return_sequences", answers,
         "num_beams at most");
  expect(beams || options.temperature > 0 || answers <= 1, "num_return_sequences", answers,
         "1 without num_beams and temperature: all answers would be the same");
  MOESAIC_CHECK(wrong.empty(), UsageError, "sampling options out of range:{}", wrong);
}

int64_t Sampler::next(std::span<float> logits, const std::vector<int64_t>& seen, int64_t prompt) {
  auto largest = [&] { return std::max_element(logits.begin(), logits.end()); };
  check_logits(
      std::isfinite(*largest()) && std::none_of(logits.begin(), logits.end(), [](float z) { return std::isnan(z); }),
      seen.size());
  const std::span<const int64_t> answer(seen.data() + prompt, seen.size() - prompt);
  if (options_.repetition_penalty != 1.0) apply_repetition_penalty(logits, seen, options_.repetition_penalty);
  if (options_.frequency_penalty != 0 || options_.presence_penalty != 0) {
    apply_penalties(logits, answer, options_.frequency_penalty, options_.presence_penalty);
  }
  for (const auto& [token, bias] : options_.logit_bias) logits[token] += static_cast<float>(bias);
  if (std::ssize(answer) < options_.min_new_tokens) {
    for (const int64_t id : options_.eos_ids) logits[id] = kRemoved;
  }
  const auto best = largest();
  MOESAIC_CHECK(std::isfinite(*best), UsageError,
                "logit_bias, min_tokens: every token after {} is forbidden, expected at least one that is left{}",
                seen.size(), options_.grammar ? " by the grammar, too" : "");
  if (options_.temperature == 0) return best - logits.begin();
  apply_filters(logits, options_);
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
