#include "moesaic/models/single_model.h"

#include <malloc.h>

namespace moesaic::models {

void SingleModel::add_parameter_sites(const std::set<std::string>& others) {
  for (const auto& item : named_parameters()) {
    if (others.contains(item.key())) continue;
    const torch::Tensor weight = item.value();
    // Linears are rows of one matrix, so that the numbers move and not the tensors.
    sites().weights.push_back({item.key(), weight.sizes().vec(),
                               [weight, own = std::make_shared<torch::Tensor>()](const torch::Tensor& t) {
                                 torch::NoGradGuard no_grad;
                                 if (t.defined() && !own->defined()) *own = weight.clone();
                                 if (own->defined()) weight.copy_(t.defined() ? t : *own);
                                 if (!t.defined()) *own = torch::Tensor();
                               },
                               [weight] { return weight; }});
  }
}

void SingleModel::give_back_freed() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

int64_t SingleModel::active_parameters(double share) const {
  double active = 0;
  for (const auto& item : named_parameters()) {
    const bool of_expert = item.key().find(".experts.") != std::string::npos;
    active += static_cast<double>(item.value().numel()) * (of_expert ? share : 1.0);
  }
  return std::llround(active);
}

void SingleModel::quantize_head(nn::Head& head, bool tied) {
  head.quantize_int8();
  if (tied) return;
  for (torch::Tensor& weight : named_modules()["lm_head"]->parameters()) {
    weight.set_data(torch::empty({0}, weight.options()));
  }
}

void read_weights(const formats::Checkpoint& checkpoint, torch::nn::Module& module, const std::string& prefix) {
  for (auto& item : module.named_parameters()) {
    torch::Tensor& parameter = item.value();
    if (parameter.is_cpu()) {
      checkpoint.read_into(prefix + item.key(), parameter);
    } else {
      torch::Tensor staged = torch::empty(parameter.sizes(), parameter.options().device(torch::kCPU));
      checkpoint.read_into(prefix + item.key(), staged);
      parameter.copy_(staged);
    }
  }
}

}  // namespace moesaic::models
