#include "cli/products.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <cstdlib>
#include <filesystem>

#include "moesaic/base/check.h"
#include "moesaic/base/file_memory.h"
#include "moesaic/base/machine.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/product_speed.h"

namespace moesaic::cli {

std::string choose_products() {
  using nn::Products;
  // Own rows have the same bits in any company: a library must be so much faster, and noise must not decide.
  constexpr double kWorth = 1.1;
  const char* forced = std::getenv("MOESAIC_PRODUCTS");
  if (forced != nullptr && *forced != '\0') {
    const std::string name = forced;
    MOESAIC_CHECK(name == "own" || name == "library", UsageError, "MOESAIC_PRODUCTS '{}': expected own or library",
                  name);
    nn::set_products(name == "own" ? Products::kOwn : Products::kLibrary);
    return "MOESAIC_PRODUCTS";
  }
  if (nn::products() == Products::kLibrary) return "this processor has no AVX2 that PyTorch uses";
  const std::string what = fmt::format("products of {}, {}, {} threads", this_machine().cpu, at::get_cpu_capability(),
                                       at::get_num_threads());
  std::error_code no_program;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", no_program);
  const double found = std::stod(remembered(what, {program}, [] {
    constexpr int64_t kRows = 256, kIn = 576, kOut = 1536;
    return std::to_string(nn::advantage(nn::measure_products({{kRows, kIn, kOut, false}, {kRows, kIn, kOut, true}})));
  }));
  nn::set_products(found * kWorth < 1 ? Products::kLibrary : Products::kOwn);
  return fmt::format("measured: own kernels have {:.2f} times the library's speed", found);
}

}  // namespace moesaic::cli
