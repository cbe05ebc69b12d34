#include "moesaic/models/single_model.h"

namespace moesaic::models {

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
