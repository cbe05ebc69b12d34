#include "moesaic/adapters/claim.h"

#include "moesaic/base/check.h"

namespace moesaic::adapters {

void claim_tensors(const std::vector<FileTensor>& expected, const formats::TensorMap& tensors) {
  constexpr size_t kListed = 20;
  std::vector<std::string> wrong;
  std::set<std::string> claimed;
  for (const FileTensor& target : expected) {
    auto it = tensors.find(target.key);
    if (it == tensors.end()) {
      wrong.push_back(fmt::format("missing {}", target.key));
      continue;
    }
    claimed.insert(target.key);
    if (it->second.sizes() != at::IntArrayRef(target.shape)) {
      wrong.push_back(fmt::format("{}: got shape [{}], expected [{}]", target.key, fmt::join(it->second.sizes(), ", "),
                                  fmt::join(target.shape, ", ")));
    } else if (!it->second.is_floating_point()) {
      wrong.push_back(
          fmt::format("{}: got dtype {}, expected a float type", target.key, c10::toString(it->second.scalar_type())));
    }
  }
  for (const auto& [key, tensor] : tensors) {
    if (!claimed.contains(key)) wrong.push_back(fmt::format("unexpected {}", key));
  }
  if (!wrong.empty()) {
    const size_t total = wrong.size();
    const bool cut = total > kListed;
    if (cut) wrong.resize(kListed);
    throw DataError(
        fmt::format("the adapter does not fit the model, {} problem{}:\n  {}{}\nWrong base model, or another "
                    "target_modules?",
                    total, total == 1 ? "" : "s", fmt::join(wrong, "\n  "),
                    cut ? fmt::format("\n  ... and {} more", total - kListed) : ""));
  }
  torch::NoGradGuard no_grad;
  for (const FileTensor& target : expected) target.assign(tensors.at(target.key).to(torch::kFloat32));
}

torch::Tensor gradient_or_zeros(const torch::Tensor& tensor) {
  return tensor.grad().defined() ? tensor.grad() : torch::zeros_like(tensor);
}

}  // namespace moesaic::adapters
