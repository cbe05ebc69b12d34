// Rotary position embedding: the families' frequency scalings, and the rotation itself.
#pragma once
#include <torch/torch.h>

#include <string>
#include <vector>

#include "moesaic/nn/pass.h"

namespace moesaic::nn {

/// RoPE of one kind of layer: base, scaling and what the scaling does to the frequencies and to cos/sin.
struct RopeConfig {
  std::string type = "default";                          // default | linear | dynamic | llama3 | yarn
  double theta = 10000.0;                                // base of the frequencies
  double factor = 1.0;                                   // by which positions or frequencies are scaled
  int64_t original_max_position = 0;                     // dynamic, llama3, yarn
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn
  double attention_factor = -1;                          // of cos and sin; -1 = derived for yarn, else 1
  double mscale = 0.0, mscale_all_dim = 0.0;             // yarn
  bool truncate = true;                                  // yarn
};

/// Frequencies of a RopeConfig for heads of width k.
/// Sources: Su et al., "RoFormer", 2021; linear and dynamic (NTK-aware) scaling as transformers computes them; llama3
/// as in Meta's reference code; Peng et al., "YaRN", 2023.
class Rope {
 public:
  /// head_dim must be even.
  Rope(RopeConfig config, int64_t head_dim);

  /// Inverse frequencies [k/2] float32 for a sequence of `length` tokens (only `dynamic` depends on it).
  torch::Tensor inverse_frequencies(int64_t length) const;
  /// What cos and sin are multiplied by.
  double attention_factor() const { return attention_factor_; }
  /// cos and sin for the ragged rows. positions: [N] int64; lengths: tokens of each sequence, cached ones included.
  /// With `dynamic` every sequence has the frequencies of its own length, so neighbours never matter.
  RotaryTables tables(const torch::Tensor& positions, const std::vector<int64_t>& offsets,
                      const std::vector<int64_t>& lengths) const;

 private:
  RopeConfig config_;
  int64_t head_dim_;
  double attention_factor_ = 1.0;
  torch::Tensor inverse_frequencies_;  // [k/2] float32, within the original length
};

/// Rotates the pairs (i, i + k/2) of every head by its row's angle: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.
/// x: [N, H, k], rows may be strided; returns a new [N, H, k]. The gradient is the rotation by minus the angle.
torch::Tensor apply_rope(const torch::Tensor& x, const RotaryTables& tables);

}  // namespace moesaic::nn
