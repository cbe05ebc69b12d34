#include "moesaic/base/seed.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

namespace moesaic {
namespace {

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that mixes every bit.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t derive_seed(uint64_t seed, std::string_view name, uint64_t index) {
  uint64_t state = mix(seed);
  for (unsigned char c : name) state = mix(state ^ c);
  return mix(state ^ index);
}

at::Generator make_generator(uint64_t seed, c10::Device device) {
  if (!device.is_cuda()) return at::detail::createCPUGenerator(seed);  // of a planned model, too
  at::Generator generator =
      at::globalContext().getAcceleratorHooksInterface(device.type()).getNewGenerator(device.index());
  generator.set_current_seed(seed);
  return generator;
}

}  // namespace moesaic
