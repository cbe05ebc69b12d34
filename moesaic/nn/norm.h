// RMSNorm.
#pragma once
#include <torch/torch.h>

namespace moesaic::nn {

/// y = x / sqrt(mean(x^2) + eps) * (weight + offset), statistics in float32 (float64 for float64). x: [..., d];
/// weight: [d]; offset 1 is Gemma's form. float32 on the CPU runs fused, forward and backward.
/// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps, double offset = 0.0);

/// rms_norm with its weight [d].
struct RmsNormImpl : torch::nn::Module {
  RmsNormImpl(int64_t d, double eps, double offset, const torch::TensorOptions& options);
  torch::Tensor forward(const torch::Tensor& x) { return rms_norm(x, weight, eps_, offset_); }

  torch::Tensor weight;

 private:
  double eps_, offset_;
};
TORCH_MODULE(RmsNorm);

}  // namespace moesaic::nn
