#include "demos/greedy_match.h"

namespace moesaic::demos {

std::vector<uint8_t> greedy_matches(models::LanguageModel& model, const std::vector<data::Example>& examples,
                                    int64_t max_batch_tokens, const std::function<void(int64_t)>& on_progress) {
  torch::NoGradGuard no_grad;
  std::vector<uint8_t> result(examples.size(), 1);
  size_t begin = 0;
  while (begin < examples.size()) {
    std::vector<data::Example> group;
    int64_t tokens = 0;
    size_t end = begin;
    while (end < examples.size() &&
           (group.empty() || tokens + static_cast<int64_t>(examples[end].ids.size()) <= max_batch_tokens)) {
      tokens += static_cast<int64_t>(examples[end].ids.size());
      group.push_back(examples[end++]);
    }
    const data::Batch batch = data::collate(group, model.facts().device);
    models::Text text{batch.tokens, batch.prompt_ends};
    text.sentence = batch.sentence;
    text.rows = batch.label_rows;
    nn::Pass pass;
    const torch::Tensor best = model.head().logits(model.hidden(text, pass)).argmax(-1);
    const torch::Tensor missed = best.ne(batch.labels).cpu();
    const torch::Tensor owners = batch.label_sequences.cpu();
    for (int64_t m = 0; m < missed.size(0); ++m) {
      if (missed.data_ptr<bool>()[m]) result[begin + owners.data_ptr<int64_t>()[m]] = 0;
    }
    begin = end;
    if (on_progress) on_progress(static_cast<int64_t>(begin));
  }
  return result;
}

}  // namespace moesaic::demos
