// How many numbers several tensors hold.
#pragma once
#include <cstdint>

namespace moesaic {

/// The sum of numel() over a range of tensors, or of things that have a member `tensor`.
template <class Tensors>
int64_t count_numbers(const Tensors& tensors) {
  int64_t count = 0;
  for (const auto& item : tensors) {
    if constexpr (requires { item.tensor.numel(); }) {
      count += item.tensor.numel();
    } else {
      count += item.numel();
    }
  }
  return count;
}

}  // namespace moesaic
