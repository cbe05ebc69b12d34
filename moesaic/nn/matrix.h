// A frozen matrix in whatever storage it has.
#pragma once
#include <torch/torch.h>

#include <memory>

namespace moesaic::nn {

/// W [out, in], frozen.
class Matrix {
 public:
  virtual ~Matrix() = default;
  /// x W^T + bias: x [N, in], bias [out] or undefined -> [N, out] in x's dtype. Differentiable in x.
  virtual torch::Tensor product(const torch::Tensor& x, const torch::Tensor& bias) const = 0;
  /// gy W: [N, out] -> [N, in], the gradient of x. Without a graph.
  virtual torch::Tensor product_back(const torch::Tensor& gy) const = 0;
  /// The outputs begin .. begin + count alone; nothing is copied.
  virtual std::shared_ptr<Matrix> outputs(int64_t begin, int64_t count) const = 0;
};

/// The numbers as they are; `weight` is shared with whoever gave it.
std::shared_ptr<Matrix> dense_matrix(torch::Tensor weight);
/// int8 rows with one float32 scale each: W ~ diag(scales) Q, scale = max |row| / 127.
std::shared_ptr<Matrix> int8_matrix(const torch::Tensor& weight);

}  // namespace moesaic::nn
