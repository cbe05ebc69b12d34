// Half-precision activations that are computed with in float32, some rows at a time: see nn/half_rows.h.
#pragma once
#include <torch/torch.h>

#include <algorithm>

namespace moesaic::moe {

/// body(begin, count) over all rows of x; on a GPU all at once.
template <class Body>
void for_wide_rows(const torch::Tensor& x, Body body) {
  constexpr int64_t kRows = 64;
  const int64_t most = x.is_cpu() ? kRows : x.size(0);
  for (int64_t begin = 0; begin < x.size(0); begin += most) body(begin, std::min(most, x.size(0) - begin));
}

/// Rows begin .. begin + count in float32.
inline torch::Tensor wide_rows(const torch::Tensor& x, int64_t begin, int64_t count) {
  return x.narrow(0, begin, count).to(torch::kFloat32);
}

}  // namespace moesaic::moe
