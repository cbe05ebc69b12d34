// Next-token loss over the rows that have a label, without ever making all logits.
#pragma once
#include <torch/torch.h>

namespace moesaic::train {

/// sum_m w_m (logsumexp(z_m) - z_m[label_m]),  z = softcap(hidden_m W^T)
///
/// hidden: [M, d], the rows that have a label; weight: [V, d] (the head); labels: [M] int64; row_weights: [M] float32.
/// Computed in chunks of rows; with a frozen head the gradient of `hidden` is made in the forward pass and no logits
/// are kept. Returns a float32 scalar. softcap 0 = off.
torch::Tensor chunked_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& weight, const torch::Tensor& labels,
                                    const torch::Tensor& row_weights, double softcap);

}  // namespace moesaic::train
