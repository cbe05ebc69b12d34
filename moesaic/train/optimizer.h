// Optimisers over a flat list of tensors, each with its own learning rate and weight decay.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "moesaic/formats/safetensors.h"

namespace moesaic::train {

/// A trainable tensor and how it is updated.
struct OptimizedTensor {
  std::string name;
  torch::Tensor tensor;  // leaf; its .grad() is read by step()
  double learning_rate = 0;
  double weight_decay = 0;  // decoupled: p -= learning rate * weight decay * p
  bool may_factor = false;  // Adafactor may keep row and column means of its second moment (whole weight matrices)
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// Updates every tensor that has a gradient; `factor` multiplies the learning rates (the schedule).
  virtual void step(double factor) = 0;
  /// Everything step() depends on beside the tensors: "<tensor name>.<slot>" and "step".
  virtual formats::TensorMap state() const = 0;
  /// Restores a state(). Throws DataError that lists all missing, unexpected and mis-shaped entries.
  virtual void load_state(const formats::TensorMap& state) = 0;
};

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
};

/// Adam with decoupled weight decay, as torch.optim.AdamW:
///
///   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
///   p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
///
/// Source: arXiv 1711.05101.
std::unique_ptr<Optimizer> make_adamw(std::vector<OptimizedTensor> tensors, const AdamWOptions& options);

struct AdafactorOptions {
  int64_t initial_step = 0;         // updates made before the first one; T5's pretraining had 1.1 million
  double decay_exponent = 0.8;      // beta_2 at step t is 1 - t^-this
  double clipping_threshold = 1.0;  // of the update's root mean square
  double epsilon1 = 1e-30;          // added to g^2
  double epsilon2 = 1e-3;           // least parameter scale
  int64_t min_dim_to_factor = 128;  // smaller matrices keep a second moment of their own
};

/// Adafactor without momentum, as t5x has it:
///
///   b2 = 1 - t^-0.8, t counted from initial_step + 1;  v = b2 v + (1 - b2)(g^2 + eps1)
///   u = g / sqrt(v);  u = u / max(1, RMS(u) / clipping_threshold);  p = p - lr max(eps2, RMS(p)) u
///
/// A 2-D tensor that may be factored and has both axes of at least 128 keeps only the row and column means of v.
/// Source: arXiv 1804.04235; reference google-research/t5x adafactor.py.
/// Differs: weight decay is scaled by the learning rate, as in AdamW.
std::unique_ptr<Optimizer> make_adafactor(std::vector<OptimizedTensor> tensors, const AdafactorOptions& options);

/// Scales all gradients by min(1, max_norm / (norm + 1e-6)), norm = the 2-norm over all of them, as torch's
/// clip_grad_norm_. max_norm 0 = only measure. Returns the norm before clipping.
double clip_gradients(const std::vector<OptimizedTensor>& tensors, double max_norm);

}  // namespace moesaic::train
