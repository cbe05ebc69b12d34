#include "moesaic/formats/finite.h"

#include <ATen/ATen.h>

#include "moesaic/base/check.h"
#include "moesaic/base/text.h"

namespace moesaic::formats {

void check_finite(const TensorMap& tensors, std::optional<at::ScalarType> dtype, const std::string& where) {
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.is_floating_point() || tensor.numel() == 0 || tensor.is_meta()) continue;
    const auto [least, most] = at::aminmax(tensor.detach());  // both NaN where there is one
    const at::ScalarType kept = dtype.value_or(tensor.scalar_type());
    if (least.to(kept).isfinite().item<bool>() && most.to(kept).isfinite().item<bool>()) continue;
    const at::Tensor place = tensor.detach().to(kept).isfinite().logical_not().nonzero()[0].cpu();
    std::vector<int64_t> index(place.data_ptr<int64_t>(), place.data_ptr<int64_t>() + place.numel());
    throw DataError(
        fmt::format("{}: tensor '{}' would hold a number that is not finite as {}, first at {}: nothing is "
                    "written\nhint: damaged weights or adapter, or a number format too narrow for them",
                    where, name, c10::toString(kept), shape_text(index)));
  }
}

}  // namespace moesaic::formats
