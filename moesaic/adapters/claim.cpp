#include "moesaic/adapters/claim.h"

#include "moesaic/formats/claim.h"

namespace moesaic::adapters {

void claim_tensors(const std::vector<FileTensor>& expected, const formats::TensorMap& tensors) {
  formats::Declarations places;
  for (const FileTensor& target : expected) places[target.key] = {target.shape};
  formats::check_fits(formats::misfits(places, formats::declarations(tensors)), "adapter", "the model",
                      "wrong base model, or another target_modules?");
  torch::NoGradGuard no_grad;
  for (const FileTensor& target : expected) target.assign(tensors.at(target.key).to(torch::kFloat32));
}

torch::Tensor gradient_or_zeros(const torch::Tensor& tensor) {
  return tensor.grad().defined() ? tensor.grad() : torch::zeros_like(tensor);
}

}  // namespace moesaic::adapters
