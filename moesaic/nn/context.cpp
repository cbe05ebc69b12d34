#include "moesaic/nn/context.h"

#include "moesaic/base/check.h"

namespace moesaic::nn {

RaggedBatch RaggedBatch::from_sequences(const std::vector<std::vector<int64_t>>& sequences, torch::Device device) {
  MOESAIC_CHECK(!sequences.empty(), ShapeError, "batch: got no sequence, expected at least one");
  RaggedBatch batch;
  batch.offsets.push_back(0);
  std::vector<int64_t> tokens;
  for (size_t b = 0; b < sequences.size(); ++b) {
    MOESAIC_CHECK(!sequences[b].empty(), ShapeError, "batch: sequence {} is empty, expected at least one token", b);
    tokens.insert(tokens.end(), sequences[b].begin(), sequences[b].end());
    batch.offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  batch.tokens = torch::tensor(tokens, torch::kInt64).to(device);
  return batch;
}

}  // namespace moesaic::nn
