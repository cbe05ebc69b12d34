#include "moesaic/train/optimizer.h"

namespace moesaic::train {

double clip_gradients(const std::vector<OptimizedTensor>& tensors, double max_norm) {
  std::vector<torch::Tensor> norms;
  for (const auto& t : tensors) {
    if (t.tensor.grad().defined()) norms.push_back(at::linalg_vector_norm(t.tensor.grad()));
  }
  if (norms.empty()) return 0;
  const double norm = at::linalg_vector_norm(at::stack(norms)).item<double>();
  if (max_norm > 0) {
    const double scale = max_norm / (norm + 1e-6);
    if (scale < 1) {
      for (const auto& t : tensors) {
        if (t.tensor.grad().defined()) t.tensor.grad().mul_(scale);
      }
    }
  }
  return norm;
}

}  // namespace moesaic::train
