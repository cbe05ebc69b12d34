// Tokenised training examples and the batches made of them.
#pragma once
#include <torch/torch.h>

#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/nn/pass.h"

namespace moesaic::data {

/// One tokenised example. ids[i] is a target (predicted from ids[0..i)) when mask[i] is 1.
struct Example {
  std::vector<int64_t> ids;
  std::vector<uint8_t> mask;    // same length as ids
  std::vector<float> sentence;  // router input `sentence` from a column; empty otherwise
  int64_t dataset = 0;          // index in the mixture
  /// Numbers of tokens behind which an answer begins, ascending. Routers and compositions read them; whether prompts
  /// are learnt too says the mask alone.
  std::vector<int64_t> prompt_ends;
  int64_t targets() const;  // number of ones in mask[1..]
  /// Sets prompt_ends where the mask is of answers only: i with mask[i - 1] = 0 and mask[i] = 1.
  void end_prompts_by_mask();
};

/// A ragged batch with its labels.
struct Batch {
  nn::RaggedBatch tokens;
  torch::Tensor label_rows;                       // [M] int64: rows whose next token is a target
  torch::Tensor labels;                           // [M] int64: that next token
  torch::Tensor label_sequences;                  // [M] int64: sequence of each label row
  torch::Tensor sentence;                         // [B, d_e] float32 or undefined
  std::vector<int64_t> datasets;                  // [B]
  std::vector<std::vector<int64_t>> prompt_ends;  // of each sequence
  int64_t num_targets() const { return labels.defined() ? labels.size(0) : 0; }
};

Batch collate(const std::vector<Example>& examples, torch::Device device);

/// An endless or finite stream of examples whose place can be saved and restored exactly.
class ExampleStream {
 public:
  virtual ~ExampleStream() = default;
  /// nullopt at the end (never for an endless training stream).
  virtual std::optional<Example> next() = 0;
  /// The cursor: everything needed to go on exactly here.
  virtual Json state() const = 0;
  virtual void set_state(const Json& state) = 0;
};

}  // namespace moesaic::data
