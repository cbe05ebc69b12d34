// Dropout: of every number by itself, and as T5 trains with it, drawn once for a whole sequence.
#pragma once
#include <torch/torch.h>

#include "moesaic/nn/pass.h"

namespace moesaic::nn {

/// y = m x / (1 - p),  m ~ Bernoulli(1 - p) of x's shape; x itself outside of training.
torch::Tensor drop(const torch::Tensor& x, double p, const Pass& pass);

/// y[n, c] = m[b, c] x[n, c] / (1 - p),  m ~ Bernoulli(1 - p), b the sequence of row n, p = pass.dropout; x itself
/// outside of training. x: [N, d], the rows of the pass, or [M, d], its `rows` [M] alone. Saves m alone.
/// Source: T5X, `Dropout(broadcast_dims=(-2,))`.
torch::Tensor drop_columns(const torch::Tensor& x, const Pass& pass, const torch::Tensor& rows = {});

/// Dropout of attention's probabilities P[h, n, j], drawn once for all queries n: as the sum over j of P v is the same
/// with the factor at v,
///
///   v'[j, h] = m[j, h] v[j, h] / (1 - p)
///
/// v: [N_k, H_kv, k]. Query heads that share a KV head share its draw.
torch::Tensor drop_keys(const torch::Tensor& v, const Pass& pass);

}  // namespace moesaic::nn
