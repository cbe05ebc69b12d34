// Linears that read the same input, kept as one matrix: one GEMM for q, k, v and one for gate, up.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <vector>

#include "moesaic/nn/matrix.h"
#include "moesaic/nn/site.h"

namespace moesaic::nn {

/// y = x W^T + b. A handle: `weight` [out, in] is a view of its group's matrix, named as in the checkpoint.
struct LinearImpl : torch::nn::Module {
  LinearImpl(torch::Tensor weight, torch::Tensor bias);  // bias may be undefined
  torch::Tensor weight;
  torch::Tensor bias;
};
TORCH_MODULE(Linear);

/// Linears over one input:
///
///   y_j = (W_j (x * m_j) + b_j) * l_j + delta_j(x)
///
/// m, l: the input and output scales of (IA)^3 and MoV; delta: what LoRA and MoLoRA add, which read the unscaled x. The
/// frozen base is one product; when a member's weight requires grad (full fine-tuning) each member is its own product.
class LinearGroup {
 public:
  /// outs: output width of each member; heads: into how many heads its output scales see it, 0 = flat, none given =
  /// all flat. Allocates the fused matrix [sum of outs, in] (and bias) with `options`.
  LinearGroup(int64_t in, std::vector<int64_t> outs, bool bias, const torch::TensorOptions& options,
              std::vector<int64_t> heads = {});

  /// The members, to be registered under the checkpoint's names.
  const std::vector<Linear>& members() const { return members_; }
  /// x: [N, in] -> [N, sum of outs], adapters included.
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  /// The same by member, [N, out_j] each.
  std::vector<torch::Tensor> parts(const torch::Tensor& x, Pass& pass);
  /// Without the deltas: a tensor of its own, [N, sum of outs].
  torch::Tensor base(const torch::Tensor& x, Pass& pass) const;

  /// The frozen matrix [sum of outs, in].
  const std::shared_ptr<Matrix>& matrix() const { return matrix_; }
  const torch::Tensor& bias() const { return bias_; }  // [sum of outs] or undefined
  const std::vector<int64_t>& outs() const { return outs_; }
  int64_t in() const { return in_; }
  /// Column where member `index` starts in the output.
  int64_t column(int64_t index) const;
  /// Input scales or output scales act on some member.
  bool scaled() const;
  /// An adapter or a weight of it requires a gradient.
  bool trains() const;

  /// Replaces the float weight by int8 with one float scale per row.
  void quantize_int8();

  ScaleSlot& input_slot(int64_t index) { return inputs_[index]; }
  ScaleSlot& output_slot(int64_t index) { return outputs_[index]; }
  std::shared_ptr<GroupAdapter> delta;  // the slot of what is added

 private:
  torch::Tensor product(const torch::Tensor& x) const;
  torch::Tensor member_product(int64_t index, const torch::Tensor& x) const;
  std::vector<torch::Tensor> base_parts(const torch::Tensor& x, Pass& pass) const;

  int64_t in_;
  std::vector<int64_t> outs_, heads_;
  std::vector<Linear> members_;
  std::vector<ScaleSlot> inputs_, outputs_;
  torch::Tensor weight_, bias_;
  std::shared_ptr<Matrix> matrix_;
};

}  // namespace moesaic::nn
