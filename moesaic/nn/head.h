// From final hidden states to probabilities over the vocabulary.
#pragma once
#include <torch/torch.h>

#include <memory>

#include "moesaic/nn/matrix.h"

namespace moesaic::nn {

/// z = softcap(h W^T), softcap(z) = cap tanh(z / cap); W [V, d].
class Head {
 public:
  /// `weight` is shared with the model (the embedding's when tied). softcap 0 = off.
  Head(torch::Tensor weight, double softcap);

  /// hidden [M, d] -> logits [M, V] float32.
  torch::Tensor logits(const torch::Tensor& hidden) const;
  /// log softmax(z_m)[target_m], [M] float32 for targets [M] int64; logits are made in chunks of rows, never whole.
  /// is_greedy, when given, becomes [M] bool: the target is the argmax. No gradient.
  torch::Tensor log_probs(const torch::Tensor& hidden, const torch::Tensor& targets,
                          torch::Tensor* is_greedy = nullptr) const;
  /// sum_m w_m CE(z_m, label_m), with the z-loss of the logits, with gradients of `hidden` and, when it is trained, of
  /// W; see chunked_cross_entropy.
  torch::Tensor loss(const torch::Tensor& hidden, const torch::Tensor& labels, const torch::Tensor& row_weights,
                     double z_loss = 0.0) const;

  int64_t vocab_size() const { return vocab_size_; }
  /// Undefined when quantised.
  const torch::Tensor& weight() const { return weight_; }
  /// Replaces the floats by int8 rows. `loss` then throws UsageError.
  void quantize_int8();

 private:
  torch::Tensor weight_;
  std::shared_ptr<Matrix> matrix_;
  double softcap_;
  int64_t vocab_size_;
};

}  // namespace moesaic::nn
