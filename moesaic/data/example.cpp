#include "moesaic/data/example.h"

#include "moesaic/base/check.h"

namespace moesaic::data {

int64_t Example::targets() const {
  int64_t count = 0;
  for (size_t i = 1; i < mask.size(); ++i) count += mask[i] != 0;
  return count;
}

void Example::end_prompts_by_mask() {
  prompt_ends.clear();
  for (size_t i = 1; i < mask.size(); ++i) {
    if (mask[i - 1] == 0 && mask[i] != 0) prompt_ends.push_back(static_cast<int64_t>(i));
  }
}

Batch collate(const std::vector<Example>& examples, torch::Device device) {
  std::vector<std::vector<int64_t>> sequences;
  std::vector<int64_t> rows, labels, label_sequences;
  std::vector<float> sentence;
  Batch batch;
  int64_t offset = 0;
  for (size_t b = 0; b < examples.size(); ++b) {
    const Example& example = examples[b];
    MOESAIC_CHECK(example.mask.size() == example.ids.size(), ShapeError, "collate: example {} has {} ids and {} mask",
                  b, example.ids.size(), example.mask.size());
    MOESAIC_CHECK(example.sentence.size() == examples[0].sentence.size(), DataError,
                  "a batch mixes sentence embeddings of {} and {} numbers; every data set of the run needs the column, "
                  "with one length",
                  examples[0].sentence.size(), example.sentence.size());
    // Row i predicts token i + 1.
    for (size_t i = 0; i + 1 < example.ids.size(); ++i) {
      if (!example.mask[i + 1]) continue;
      rows.push_back(offset + static_cast<int64_t>(i));
      labels.push_back(example.ids[i + 1]);
      label_sequences.push_back(static_cast<int64_t>(b));
    }
    offset += static_cast<int64_t>(example.ids.size());
    sequences.push_back(example.ids);
    sentence.insert(sentence.end(), example.sentence.begin(), example.sentence.end());
    batch.datasets.push_back(example.dataset);
    batch.prompt_ends.push_back(example.prompt_ends);
  }
  batch.tokens = nn::RaggedBatch::from_sequences(sequences, device);
  batch.label_rows = torch::tensor(rows, torch::kInt64).to(device);
  batch.labels = torch::tensor(labels, torch::kInt64).to(device);
  batch.label_sequences = torch::tensor(label_sequences, torch::kInt64).to(device);
  if (!sentence.empty()) {
    batch.sentence =
        torch::tensor(sentence, torch::kFloat32).view({static_cast<int64_t>(examples.size()), -1}).to(device);
  }
  return batch;
}

}  // namespace moesaic::data
