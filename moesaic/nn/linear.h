// Linears that read the same input, kept as one matrix: one GEMM for q, k, v and one for gate, up.
#pragma once
#include "moesaic/nn/site.h"

namespace moesaic::nn {

/// y = x W^T + b. A handle: `weight` [out, in] is a view of its group's matrix, named as in the checkpoint.
struct LinearImpl : torch::nn::Module {
  LinearImpl(torch::Tensor weight, torch::Tensor bias);  // bias may be undefined
  torch::Tensor weight;
  torch::Tensor bias;
};
TORCH_MODULE(Linear);

/// Linears over one input. The frozen base is one product with `weight`; when a member's weight requires grad (full
/// fine-tuning) each member is its own product.
class LinearGroup {
 public:
  /// outs: output width of each member. Allocates the fused matrix [sum of outs, in] (and bias) with `options`.
  LinearGroup(int64_t in, std::vector<int64_t> outs, bool bias, const torch::TensorOptions& options);

  /// The members, to be registered under the checkpoint's names.
  const std::vector<Linear>& members() const { return members_; }
  /// x: [N, in] -> [N, sum of outs], adapter included.
  torch::Tensor forward(const torch::Tensor& x, ForwardContext& context);
  /// The base product alone.
  torch::Tensor base_forward(const torch::Tensor& x) const;

  const torch::Tensor& weight() const { return weight_; }  // [sum of outs, in]
  const torch::Tensor& bias() const { return bias_; }      // [sum of outs] or undefined
  const std::vector<int64_t>& outs() const { return outs_; }
  int64_t in() const { return in_; }
  /// Column where member `index` starts in the output.
  int64_t column(int64_t index) const;

  /// Replaces the float weight by int8 with one float scale per row (decode only; training then throws).
  void quantize_int8();
  bool quantized() const { return quantized_.defined(); }

  std::shared_ptr<GroupAdapter> adapter;  // the slot

 private:
  int64_t in_;
  std::vector<int64_t> outs_;
  std::vector<Linear> members_;
  torch::Tensor weight_, bias_;
  torch::Tensor quantized_, scales_;  // int8 [sum of outs, in], float32 [sum of outs]
};

}  // namespace moesaic::nn
