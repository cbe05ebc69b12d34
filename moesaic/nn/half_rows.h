// bfloat16 rows on their way through the float32 kernels: a row at a time, so that no float32 copy of a whole
// activation is made. Temporaries of that size lie between what the backward pass keeps, and the heap grows by the
// gaps.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

namespace moesaic::nn {

inline void widen(const c10::BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void narrow(const float* from, c10::BFloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = c10::BFloat16(from[i]);
}

}  // namespace moesaic::nn
