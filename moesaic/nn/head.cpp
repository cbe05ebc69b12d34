#include "moesaic/nn/head.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/loss.h"

namespace moesaic::nn {

Head::Head(torch::Tensor weight, double softcap)
    : weight_(std::move(weight)), matrix_(dense_matrix(weight_)), softcap_(softcap), vocab_size_(weight_.size(0)) {}

torch::Tensor Head::logits(const torch::Tensor& hidden) const {
  const torch::Tensor z = matrix_->product(hidden, {}).to(torch::kFloat32);
  return softcap_ > 0 ? at::tanh(z / softcap_) * softcap_ : z;
}

torch::Tensor Head::log_probs(const torch::Tensor& hidden, const torch::Tensor& targets,
                              torch::Tensor* is_greedy) const {
  torch::NoGradGuard no_grad;
  constexpr int64_t kLogitsPerChunk = int64_t{1} << 22;  // 16 MiB of float32
  const int64_t rows = hidden.size(0), chunk = std::max<int64_t>(1, kLogitsPerChunk / vocab_size_);
  torch::Tensor result = torch::empty({rows}, torch::dtype(torch::kFloat32).device(hidden.device()));
  if (is_greedy) *is_greedy = torch::empty({rows}, torch::dtype(torch::kBool).device(hidden.device()));
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(rows, begin + chunk);
    const torch::Tensor z = logits(hidden.slice(0, begin, end));
    const torch::Tensor wanted = targets.slice(0, begin, end);
    const torch::Tensor picked = z.gather(1, wanted.unsqueeze(1)).squeeze(1);
    result.slice(0, begin, end).copy_(picked - z.logsumexp(1));
    if (is_greedy) is_greedy->slice(0, begin, end).copy_(z.argmax(1) == wanted);
  }
  return result;
}

torch::Tensor Head::loss(const torch::Tensor& hidden, const torch::Tensor& labels, const torch::Tensor& row_weights,
                         double z_loss) const {
  MOESAIC_CHECK(weight_.defined(), UsageError, "loss: the head is quantised to int8, expected float weights");
  return chunked_cross_entropy(hidden, weight_, labels, row_weights, softcap_, z_loss);
}

void Head::quantize_int8() {
  matrix_ = int8_matrix(weight_);
  weight_ = torch::Tensor();
}

}  // namespace moesaic::nn
