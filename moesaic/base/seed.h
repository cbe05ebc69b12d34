// One seed for a whole run; every use of chance gets its own, named sub-seed.
#pragma once
#include <ATen/core/Generator.h>

#include <cstdint>
#include <string_view>

namespace moesaic {

/// A sub-seed of `seed` for the use `name` and item `index`: derive_seed(42, "shuffle", epoch). Equal on every machine,
/// so adding one use of chance does not change the others.
uint64_t derive_seed(uint64_t seed, std::string_view name, uint64_t index = 0);

/// A generator of its own with this seed.
at::Generator make_generator(uint64_t seed, c10::Device device = c10::kCPU);

}  // namespace moesaic
