#include "moesaic/nn/pass.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/block.h"
#include "moesaic/nn/source.h"

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

std::vector<int64_t> RaggedBatch::counts() const {
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < batch_size(); ++b) rows.push_back(offsets[b + 1] - offsets[b]);
  return rows;
}

torch::Tensor Pass::forward(Block& block, const torch::Tensor& h) {
  return run ? run(block, h, *this) : block.forward(h, *this);
}

Pass Pass::sibling() const {
  Pass other;
  other.training = training;
  other.generator = generator;
  other.routing = routing;
  other.readings = readings;
  other.run = run;
  return other;
}

Pass Pass::over_source() const {
  Pass other = sibling();
  other.place = place;
  other.dropout = dropout;
  other.offsets = source->offsets;
  other.segments = source->segments;
  other.sentence = sentence;
  other.mixture = mixture;
  other.layer_input = source->states;
  return other;
}

std::vector<MixtureRun> Pass::mixture_runs() const {
  std::vector<MixtureRun> runs;
  if (!mixture.defined()) return runs;
  const int64_t adapters = mixture.size(1), rows = segments.size(0);
  const float* weights = mixture.data_ptr<float>();
  const auto* sequence = segments.data_ptr<int64_t>();
  for (int64_t n = 0; n < rows; ++n) {
    const float* own = weights + sequence[n] * adapters;
    const bool goes_on = n > 0 && (runs.back().weights == own || std::equal(own, own + adapters, runs.back().weights));
    if (!goes_on) runs.push_back({n, n, own});
    runs.back().end = n + 1;
  }
  return runs;
}

torch::Tensor Pass::adapter_weight(int64_t column) const {
  if (!mixture.defined() || column < 0) return {};
  MOESAIC_ASSERT(column < mixture.size(1) && mixture.size(0) == std::ssize(offsets) - 1);
  return mixture.select(1, column).index_select(0, segments).unsqueeze(1);
}

}  // namespace moesaic::nn
