#include "demos/greedy_match.h"

#include <gtest/gtest.h>

#include "tests/models/tiny_models.h"

namespace moesaic::demos {
namespace {

/// `prompt` and the `count` tokens that greedy decoding puts behind it, one full forward pass each.
data::Example greedy_example(models::CausalLM& model, std::vector<int64_t> prompt, int64_t count) {
  torch::NoGradGuard no_grad;
  data::Example example;
  example.mask.assign(prompt.size(), 0);
  for (int64_t i = 0; i < count; ++i) {
    nn::Pass pass;
    const auto hidden = model.hidden({nn::RaggedBatch::from_sequences({prompt})}, pass);
    prompt.push_back(model.head().logits(hidden.narrow(0, hidden.size(0) - 1, 1)).argmax(-1).item<int64_t>());
    example.mask.push_back(1);
  }
  example.ids = std::move(prompt);
  example.end_prompts_by_mask();
  return example;
}

TEST(GreedyMatches, OnlyWhatGreedyDecodingWouldSayCounts) {
  const auto model = test::random_model(test::tiny_configs().front().second);
  std::vector<data::Example> examples;
  for (int64_t i = 0; i < 5; ++i) examples.push_back(greedy_example(*model, {i, i + 3, 2 * i + 1}, i + 1));
  examples[1].ids.back() = (examples[1].ids.back() + 1) % 53;  // last target
  examples[3].ids[3] = (examples[3].ids[3] + 1) % 53;          // first target
  const std::vector<uint8_t> expected{1, 0, 1, 0, 1};
  for (int64_t max_batch_tokens : {1, 9, 1000}) {
    EXPECT_EQ(greedy_matches(*model, examples, max_batch_tokens), expected) << max_batch_tokens;
  }
  // 4, 5, 6, 7 and 8 tokens
  std::vector<int64_t> done;
  greedy_matches(*model, examples, 11, [&](int64_t count) { done.push_back(count); });
  EXPECT_EQ(done, (std::vector<int64_t>{2, 3, 4, 5}));
}

}  // namespace
}  // namespace moesaic::demos
