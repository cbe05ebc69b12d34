#include "moesaic/nn/site.h"

namespace moesaic::nn {

torch::Tensor ScaleSlot::apply(torch::Tensor y, Pass& pass) const {
  if (empty()) return y;
  for (const auto& adapter : adapters) y = adapter->forward(y, pass);
  return y;
}

bool ScaleSlot::trains() const {
  return std::any_of(adapters.begin(), adapters.end(), [](const auto& adapter) { return adapter->trains(); });
}

int64_t ScaleSlot::saved_per_row() const {
  int64_t numbers = 0;
  for (const auto& adapter : adapters) numbers += adapter->saved_per_row();
  return numbers;
}

}  // namespace moesaic::nn
