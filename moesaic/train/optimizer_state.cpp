#include "moesaic/train/optimizer_state.h"

#include <torch/torch.h>

#include "moesaic/formats/claim.h"

namespace moesaic::train {

void restore_slots(const formats::TensorMap& state, const formats::TensorMap& slots) {
  formats::check_fits(
      formats::misfits(formats::declarations(slots), formats::declarations(state), formats::Dtypes::kSame),
      "optimizer state", "this run", "resume with the adapter and optimizer settings the checkpoint was made with");
  torch::NoGradGuard no_grad;
  for (const auto& [name, slot] : slots) slot.copy_(state.at(name));
}

}  // namespace moesaic::train
