// Next-token loss over the rows that have a label, without ever making all logits.
#pragma once
#include <torch/torch.h>

namespace moesaic::nn {

/// sum_m w_m (lse_m - z_m[label_m] + z_loss lse_m^2),  lse_m = logsumexp(z_m),  z = softcap(hidden_m W^T),
/// softcap(z) = cap tanh(z / cap)
///
/// hidden: [M, d], the rows that have a label; weight: [V, d] (the head); labels: [M] int64; row_weights: [M] float32.
/// Computed in chunks of rows; the gradients of `hidden` and, when it requires grad, of `weight` are made in the
/// forward pass and no logits are kept. Logits of a low-precision head are rounded to its dtype by the product, as in
/// transformers; softmax, loss and the head's gradient are float32. Returns a float32 scalar (float64 for float64
/// input). softcap 0 = off. M = 0 gives 0. Source of the z-loss: Chowdhery et al., "PaLM", 2022.
torch::Tensor chunked_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& weight,
                                    const torch::Tensor& labels, const torch::Tensor& row_weights, double softcap,
                                    double z_loss = 0.0);

/// Bytes of one chunk's logits on `device`, the most that the loss allocates beside its gradients: for estimates.
int64_t cross_entropy_chunk_bytes(torch::Device device);

}  // namespace moesaic::nn
