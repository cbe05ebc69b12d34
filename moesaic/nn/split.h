// Cutting a fused product into the outputs of its members.
#pragma once
#include <torch/torch.h>

#include <vector>

namespace moesaic::nn {

/// Views of the column ranges of x [N, sum of widths]. Unlike narrow, whose gradient fills a whole zero matrix per
/// piece, the gradient is one concatenation.
std::vector<torch::Tensor> split_columns(const torch::Tensor& x, const std::vector<int64_t>& widths);

}  // namespace moesaic::nn
