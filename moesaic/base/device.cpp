#include "moesaic/base/device.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <dlfcn.h>
#include <spdlog/spdlog.h>

#include <charconv>
#include <cstdlib>
#include <system_error>

#include "moesaic/base/check.h"

namespace moesaic {

bool load_cuda() {
  static const bool usable = [] {
    if (dlopen("libcuda.so.1", RTLD_LAZY) == nullptr) return false;  // no driver
    // Of the wheel that the program was built with, or of one that the user has.
    const char* folder = std::getenv("MOESAIC_TORCH_LIB");
    const std::string library = folder != nullptr ? std::string(folder) + "/libtorch_cuda.so" : "libtorch_cuda.so";
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      spdlog::warn("an NVIDIA driver is here, but LibTorch's CUDA libraries do not load: {}", dlerror());
      return false;
    }
    try {
      return at::globalContext().hasCUDA() &&
             at::globalContext().getAcceleratorHooksInterface(at::kCUDA).deviceCount() > 0;
    } catch (const c10::Error& error) {
      spdlog::warn("CUDA does not start: {}", error.what_without_backtrace());
      return false;
    }
  }();
  return usable;
}

c10::Device parse_device(const std::string& name) {
  if (name == "cpu") return c10::kCPU;
  if (name == "auto") return load_cuda() ? c10::Device(c10::kCUDA, 0) : c10::Device(c10::kCPU);
  MOESAIC_CHECK(name == "cuda" || name.starts_with("cuda:"), UsageError,
                "device '{}': expected auto, cpu, cuda or cuda:N", name);
  int index = 0;
  if (name != "cuda") {
    const char* end = name.data() + name.size();
    auto [stop, error] = std::from_chars(name.data() + 5, end, index);
    MOESAIC_CHECK(error == std::errc() && stop == end && index >= 0, UsageError,
                  "device '{}': expected cuda:N with a number N from 0", name);
  }
  MOESAIC_CHECK(load_cuda(), UsageError,
                "device '{}': no usable GPU (needs an NVIDIA driver and LibTorch's CUDA libraries; see moesaic doctor)",
                name);
  int count = at::globalContext().getAcceleratorHooksInterface(at::kCUDA).deviceCount();
  MOESAIC_CHECK(index < count, UsageError, "device '{}': this machine has {} GPU(s), numbered from 0", name, count);
  return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

bool cpu_has_fast_bfloat16() {
  if (at::get_cpu_capability() != "AVX512") return false;
  auto capabilities = at::cpu::get_cpu_capabilities();
  auto has = [&](const char* name) {
    auto it = capabilities.find(name);
    return it != capabilities.end() && it->second.isBool() && it->second.toBool();
  };
  return has("avx512_bf16") || has("amx_bf16");
}

NumberFormat number_format(const std::string& name, c10::Device device) {
  if (name == "float32" || name == "f32") return {c10::kFloat, "asked for"};
  if (name == "bfloat16" || name == "bf16") return {c10::kBFloat16, "asked for"};
  const bool half = name == "float16" || name == "fp16" || name == "f16" || name == "half";
  MOESAIC_CHECK(name == "auto", UsageError, "dtype '{}': expected auto, float32 or bfloat16{}", name,
                half ? ": activations exceed float16's largest number, 65504, in T5 and others" : "");
  if (device.is_cuda()) return {c10::kBFloat16, "a GPU multiplies it faster than float32"};
  if (cpu_has_fast_bfloat16()) return {c10::kBFloat16, "this CPU multiplies it faster than float32"};
  return {c10::kFloat, "this CPU has no fast bfloat16"};
}

std::string dtype_name(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat: return "float32";
    case c10::kDouble: return "float64";
    case c10::kHalf: return "float16";
    case c10::kBFloat16: return "bfloat16";
    case c10::kLong: return "int64";
    case c10::kInt: return "int32";
    default: return c10::toString(dtype);
  }
}

void set_threads(int threads) {
  MOESAIC_CHECK(threads >= 0, UsageError, "threads {}: expected 0 (automatic) or more", threads);
  if (threads > 0) at::set_num_threads(threads);
}

}  // namespace moesaic
