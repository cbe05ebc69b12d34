// Text generation over a causal model with a KV cache.
#pragma once
#include <functional>
#include <memory>

#include "moesaic/models/causal_lm.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::generate {

struct SamplingOptions {
  int64_t max_new_tokens = 256;
  double temperature = 0.0;         // 0 = greedy
  int64_t top_k = 0;                // 0 = off
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;  // transformers' definition, over prompt and answer
  std::vector<std::string> stop;    // stop strings; cut from the answer
  std::vector<int64_t> eos_ids;
  uint64_t seed = 0;
};

struct Generation {
  std::vector<int64_t> ids;     // without the prompt; EOS included when it ended the answer
  std::string text;             // without EOS and stop string
  std::string finish_reason;    // stop | length
};

/// Called with each new piece of text of sequence `index`. Return false to stop that sequence.
using StreamCallback = std::function<bool(int64_t index, const std::string& piece)>;

/// Answers every prompt; sequences leave the batch as they finish. A sequence's answer does not depend on its
/// neighbours: each has its own generator seeded with seed + index.
/// sentence: [B, d_e] for adapters with router input `sentence`, or undefined.
std::vector<Generation> generate(models::CausalLM& model, const tokenizer::Tokenizer& tokenizer,
                                 const std::vector<std::vector<int64_t>>& prompts, const SamplingOptions& options,
                                 const StreamCallback& stream = nullptr, const torch::Tensor& sentence = {});

/// log p(ids[i+1] | ids[0..i]) in float32, one vector per sequence.
std::vector<std::vector<float>> score(models::CausalLM& model, const std::vector<std::vector<int64_t>>& sequences,
                                      const torch::Tensor& sentence = {});

}  // namespace moesaic::generate
