// moesaic doctor: what a bug report needs to say about the machine.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/torch.h>

#include "cli/command.h"
#include "cli/commit.h"
#include "cli/products.h"
#include "moesaic/base/device.h"
#include "moesaic/base/json.h"
#include "moesaic/base/machine.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/product_speed.h"

namespace moesaic::cli {
namespace {

/// Seconds of one float GEMM of this size in `dtype`, best of three after a warm-up.
double gemm_seconds(c10::ScalarType dtype, int64_t rows, int64_t width) {
  auto a = torch::ones({rows, width}, dtype), b = torch::ones({width, width}, dtype);
  double best = 1e9;
  for (int i = 0; i < 4; ++i) {
    auto start = std::chrono::steady_clock::now();
    torch::matmul(a, b);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) best = std::min(best, seconds);
  }
  return best;
}

/// Of SmolLM2-135M's linears and head, for a part of a prompt, a prompt and a training step.
std::vector<nn::ProductShape> shapes() {
  std::vector<nn::ProductShape> result;
  for (const int64_t rows : {32, 256, 2048}) {
    for (const bool back : {false, true}) result.push_back({rows, 576, 1536, back});
  }
  result.push_back({256, 576, 16384, false});
  result.push_back({256, 576, 16384, true});
  return result;
}

}  // namespace

Runner add_doctor(CLI::App& app, CommonOptions& common) {
  auto json = std::make_shared<bool>(false);
  app.add_flag("--json", *json, "Print as JSON");
  return [json, &common] {
    constexpr int64_t kRows = 512, kWidth = 1024;
    torch::NoGradGuard no_grad;
    const Machine machine = this_machine();
    const double flop = 2.0 * kRows * kWidth * kWidth;
    const std::string flags = " " + cpu_info("flags") + " ";
    std::vector<std::string> features;
    for (const char* name : {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}) {
      if (flags.find(" " + std::string(name) + " ") != std::string::npos) features.push_back(name);
    }
    const bool cuda = load_cuda();
    const c10::Device device = parse_device(common.device);
    const NumberFormat format = number_format(common.dtype, device);
    OrderedJson report = {
        {"moesaic", kVersion},
        {"commit", kCommit},
        {"libtorch", TORCH_VERSION},
        {"compiler", __VERSION__},
        {"system", machine.system},
        {"cpu", machine.cpu},
        {"cpu_features", features},
        {"cpu_capability", at::get_cpu_capability()},
        {"cores", machine.cores},
        {"threads", at::get_num_threads()},
        {"memory_gib", std::round(static_cast<double>(machine.memory_bytes) / (1 << 30) * 10) / 10},
        {"mkl", at::hasMKL()},
        {"cuda_devices", cuda ? static_cast<int>(torch::cuda::device_count()) : 0},
        {"device", device.str()},
        {"dtype", dtype_name(format.dtype)},
        {"dtype_reason", format.reason},
        {"cpu_float32_gflops", std::round(flop / gemm_seconds(torch::kFloat32, kRows, kWidth) / 1e9)},
        {"cpu_bfloat16_gflops", std::round(flop / gemm_seconds(torch::kBFloat16, kRows, kWidth) / 1e9)},
        {"products", nn::products() == nn::Products::kOwn ? "own" : "library"},
        {"products_reason", choose_products()},
    };
    for (const nn::ProductSpeed& speed : nn::measure_products(shapes())) {
      const nn::ProductShape& shape = speed.shape;
      const std::string name =
          fmt::format("{} x {} x {}{}", shape.rows, shape.in, shape.out, shape.back ? " back" : "");
      report["product_gflops"][name] = {{"own", std::round(speed.own)}, {"library", std::round(speed.library)}};
    }
    if (*json) {
      say("{}\n", report.dump(2));
      return 0;
    }
    const OrderedJson products = report["product_gflops"];
    report.erase("product_gflops");
    for (const auto& [key, value] : report.items()) {
      say("{:<20} {}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
    }
    say("\nfloat32 products, GFLOP/s: rows x in x out, back: of a gradient\n{:<24} {:>6} {:>8}\n", "", "own",
        "library");
    for (const auto& [shape, speed] : products.items()) {
      say("{:<24} {:>6} {:>8}\n", shape, speed["own"].get<double>(), speed["library"].get<double>());
    }
    return 0;
  };
}

}  // namespace moesaic::cli
