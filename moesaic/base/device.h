// Where and in which number format a run computes.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <string>

namespace moesaic {

/// Registers LibTorch's CUDA backend when an NVIDIA driver and the CUDA wheel are there. True when a GPU can be used.
/// The program links only the CPU libraries; the first call loads the rest at run time.
bool load_cuda();

/// "auto" (a GPU when there is one, else the CPU) | "cpu" | "cuda" | "cuda:N". Throws UsageError.
c10::Device parse_device(const std::string& name);

/// A number format, and why it was chosen.
struct NumberFormat {
  c10::ScalarType dtype;
  std::string reason;  // for the first lines of a run: "asked for"
};
/// "auto" | "float32" | "bfloat16" (or "f32", "bf16"). `auto` is bfloat16 where the hardware multiplies matrices faster
/// in it: CUDA, AMX, AVX512-BF16; float32 elsewhere. Throws UsageError.
NumberFormat number_format(const std::string& name, c10::Device device);
/// "float32", "bfloat16", "float16", "float64", ...
std::string dtype_name(c10::ScalarType dtype);

/// True on a CPU with AMX tiles or AVX512-BF16 instructions, where LibTorch uses them (ATEN_CPU_CAPABILITY).
bool cpu_has_fast_bfloat16();

/// Threads of LibTorch's operators; 0 keeps its default (the cores this process may use, or OMP_NUM_THREADS).
void set_threads(int threads);

}  // namespace moesaic
