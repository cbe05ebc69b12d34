#include "moesaic/train/optimizer_state.h"

#include <torch/torch.h>

#include "moesaic/base/check.h"

namespace moesaic::train {

void restore_slots(const formats::TensorMap& state, const formats::TensorMap& slots) {
  std::vector<std::string> wrong;
  for (const auto& [name, slot] : slots) {
    auto found = state.find(name);
    if (found == state.end()) {
      wrong.push_back(fmt::format("missing {}", name));
    } else if (found->second.sizes() != slot.sizes() || found->second.scalar_type() != slot.scalar_type()) {
      wrong.push_back(fmt::format("{}: got {} [{}], expected {} [{}]", name, toString(found->second.scalar_type()),
                                  fmt::join(found->second.sizes(), ", "), toString(slot.scalar_type()),
                                  fmt::join(slot.sizes(), ", ")));
    }
  }
  for (const auto& [name, tensor] : state) {
    if (!slots.contains(name)) wrong.push_back(fmt::format("unexpected {}", name));
  }
  MOESAIC_CHECK(
      wrong.empty(), DataError,
      "optimizer state does not fit this run:\n  {}\nhint: resume with the adapter and optimizer settings the "
      "checkpoint was made with",
      fmt::join(wrong, "\n  "));
  torch::NoGradGuard no_grad;
  for (const auto& [name, slot] : slots) slot.copy_(state.at(name));
}

}  // namespace moesaic::train
