#include "moesaic/models/finite.h"

#include "moesaic/base/check.h"

namespace moesaic::models {
namespace {

bool finite(const torch::Tensor& numbers) { return numbers.isfinite().all().item<bool>(); }

}  // namespace

std::string first_not_finite(LanguageModel& model, const Text& text) {
  torch::NoGradGuard no_grad;
  std::string where;
  nn::Pass pass;
  pass.run = [&where](nn::Block& block, const torch::Tensor& h, nn::Pass& of_block) {
    torch::Tensor y = block.forward(h, of_block);
    if (where.empty() && !finite(y)) {
      const std::string owner = of_block.place.empty() ? "" : " of the model at " + of_block.place;
      where = fmt::format("the {} of layer {}{}", finite(h) ? "output" : "input", block.index(), owner);
    }
    return y;
  };
  const torch::Tensor hidden = model.hidden(text, pass);
  if (!where.empty()) return where;
  if (!finite(hidden)) return "the final norm";
  return finite(model.head().logits(hidden.slice(0, 0, 1))) ? "" : "the head's weights";
}

void check_figures(const torch::Tensor& figures, LanguageModel& model, const Text& text) {
  if (finite(figures)) return;
  const std::string where = first_not_finite(model, text);
  throw DataError(
      fmt::format("the model's numbers are not finite, first at {}: there is no result\nhint: damaged weights or "
                  "adapter, or --dtype too narrow for them",
                  where.empty() ? "its results" : where));
}

}  // namespace moesaic::models
