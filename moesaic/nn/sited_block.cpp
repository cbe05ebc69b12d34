#include "moesaic/nn/sited_block.h"

#include "moesaic/nn/linear.h"

namespace moesaic::nn {

bool SitedBlock::trains() const {
  return std::any_of(sites_.linears.begin(), sites_.linears.end(),
                     [](const LinearSite& site) { return site.group->trains(); }) ||
         std::any_of(sites_.scales.begin(), sites_.scales.end(),
                     [](const ScaleSite& site) { return site.slot->trains(); });
}

int64_t SitedBlock::scratch_per_row() const {
  int64_t widest = 0, hidden = 0;
  for (const LinearSite& site : sites_.linears) {
    if (site.role != Role::kDown) continue;
    widest = site.in;
    hidden = site.out;
  }
  // A scaled branch is taken apart: its gradient, that of the scale, the scale itself and the two halves' gradients.
  const bool scaled = std::any_of(sites_.scales.begin(), sites_.scales.end(), [](const ScaleSite& site) {
    return site.kind == ScaleKind::kFfn && !site.slot->adapters.empty();
  });
  return (scaled ? 8 : 3) * widest + 3 * hidden;
}

int64_t SitedBlock::saved_by_scales() const {
  int64_t projection = 0;  // what a scaled head activation is a view of
  for (const LinearSite& site : sites_.linears) {
    if (site.role == Role::kQuery || site.role == Role::kKey || site.role == Role::kValue) projection += site.out;
  }
  int64_t numbers = 0;
  for (const ScaleSite& site : sites_.scales) {
    if (site.slot->adapters.empty()) continue;
    numbers += site.slot->saved_per_row() + (site.heads > 0 ? projection / 2 : site.width);
  }
  return numbers;
}

}  // namespace moesaic::nn
