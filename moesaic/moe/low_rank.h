// The gated low-rank product: LoRA and MoLoRA at all linears that read one input, as one GEMM down and one up per site.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <vector>

#include "moesaic/moe/router.h"
#include "moesaic/nn/linear.h"

namespace moesaic::moe {

/// E low-rank experts at one linear of a group.
///
///   p = softmax(u W_r)                                  (E = 1: no router, p = 1)
///   y_site += scale * sum_e w p_e (x A_e^T) B_e         one product over the E*r concatenated ranks
///
/// w: what the row's request gives the adapter (nn::Pass::mixture), 1 without one: the request is one more router.
///
/// Leaves are float32 whatever the base's dtype; B lies as [E*r, out] because its gradient h^T dy is far faster on CPUs
/// than PEFT's dy^T h (docs/methods.md).
struct LowRankExperts {
  int64_t index;    // linear in the group
  int64_t experts;  // E
  int64_t rank;     // r
  double scale;     // alpha / r (or alpha / sqrt(r)), times the effect asked for when loading
  double dropout = 0.0;
  torch::Tensor a;      // [E, r, in]
  torch::Tensor b;      // [E*r, out]
  Router router;        // weight [E, in]
  int64_t column = -1;  // of the pass's mixture; -1 = none

  int64_t width() const { return experts * rank; }
};

/// All low-rank experts of one group of linears; several adapters may add theirs.
///
/// x: [N, in]; returns [N, sum of out]: base product plus every delta. One GEMM computes x A^T for all sites together
/// with the logits of the routers that read x; no tensor of shape [N, E, out] exists at any time.
/// Source: arXiv 2309.05444; docs/methods.md.
class LowRankGroup : public nn::GroupAdapter {
 public:
  /// The group's object, made when it has none.
  static std::shared_ptr<LowRankGroup> of(nn::LinearGroup& group);

  /// Adds experts whose `a`, `b` and router weight hold their initial values; the leaves are replaced by views of the
  /// fused matrix. Pass `trainable` false when only inferring.
  void add(std::shared_ptr<LowRankExperts> experts, bool trainable);
  /// Removes them; the group's slot is emptied with the last.
  void remove(const std::shared_ptr<LowRankExperts>& experts, nn::LinearGroup& group);

  torch::Tensor forward(const torch::Tensor& x, const nn::LinearGroup& group, nn::Pass& pass) override;
  bool trains() const override;
  int64_t saved_per_row() const override;

 private:
  /// forward() where every row has its own weights of the adapters and nothing learns: a row computes those alone that
  /// it gives a weight to, and gets the same bits whatever is beside it.
  torch::Tensor forward_mixed(const torch::Tensor& x, const nn::LinearGroup& group, nn::Pass& pass) const;
  /// The tensors that are views of `down_`, in its order.
  std::vector<torch::Tensor> fused_leaves() const;
  void fuse();
  /// False where somebody gave a leaf other memory (torch::Tensor::set_data).
  bool is_fused() const;
  /// The gated ranks [N, sum E*r] from U and the logits of plain routers.
  torch::Tensor gate(const torch::Tensor& x, const torch::Tensor& u, const torch::Tensor& logits, nn::Pass& pass) const;

  std::vector<std::shared_ptr<LowRankExperts>> experts_;
  torch::Tensor down_;  // [sum E*r + sum E, in]: every A, then every router weight that reads x
};

/// G = (s repeated over ranks) * U for all sites of a group, s = softmax(L / T) per site; float32, CPU.
/// U: [N, sum E*r], L: [N, sum E] of the sites with E > 1. Exposed for tests and benchmarks.
torch::Tensor gate_ranks(const torch::Tensor& u, const torch::Tensor& logits, const std::vector<int64_t>& experts,
                         const std::vector<int64_t>& ranks, const std::vector<double>& temperatures);

}  // namespace moesaic::moe
