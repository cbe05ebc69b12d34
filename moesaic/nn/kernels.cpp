#include "moesaic/nn/kernels.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <atomic>

#include "moesaic/base/check.h"

namespace moesaic::nn {
namespace {

constexpr int64_t kGemvRows = 4;             // more rows round as in training, where the library multiplies
constexpr int64_t kGemvRowsInt8 = 16;        // more rows: packed panels are faster, with the same bits
constexpr int64_t kGemvGrain = 32 << 10;     // weights per task; less is not worth waking a thread
constexpr int64_t kQuantizedPart = 1 << 20;  // weights that are float32 at once while they are quantised
constexpr int64_t kGemmColumns = 64;         // output columns per task of an int8 GEMM
constexpr int64_t kGemmPanel = 32;           // columns, and least rows, of a part of a float32 GEMM
constexpr int64_t kGemmGrain = 1 << 20;      // multiplications of a part

bool wants_gradient(const torch::Tensor& x, const torch::Tensor& weight) {
  return torch::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad());
}

constexpr int64_t kWideNumbers = 4 << 20;  // of a weight, and of rows, that are float32 at once

/// One of this thread's float32 buffers, [rows, columns]. They are kept: made anew each time, they leave holes in the
/// heap between what lives on, which took a training a third more memory.
torch::Tensor wide_buffer(int number, int64_t rows, int64_t columns) {
  static thread_local torch::Tensor buffers[3];
  torch::Tensor& buffer = buffers[number];
  if (!buffer.defined() || buffer.numel() < rows * columns) {
    buffer = torch::Tensor();
    // At once as large as most need: what it outgrew would be another hole, and pages that nobody touches are none.
    buffer = torch::empty({std::max(rows * columns, kWideNumbers)}, torch::kFloat32);
  }
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

/// Calls use(row, rows, begin, count, stretch) for blocks of `rows` rows and stretches of the weight's, in float32.
template <class Use>
void for_wide_blocks(int64_t all_rows, const torch::Tensor& weight, const Use& use) {
  const int64_t out = weight.size(0), in = std::max<int64_t>(1, weight.size(1));
  const int64_t most_out = std::clamp<int64_t>(kWideNumbers / in, 1, std::max<int64_t>(1, out));
  const int64_t most_rows = std::max<int64_t>(1, kWideNumbers / std::max(in, most_out));
  for (int64_t row = 0; row < all_rows; row += most_rows) {
    const int64_t rows = std::min(most_rows, all_rows - row);
    for (int64_t begin = 0; begin < out; begin += most_out) {
      const int64_t count = std::min(most_out, out - begin);
      use(row, rows, begin, count, wide_buffer(0, count, weight.size(1)).copy_(weight.narrow(0, begin, count)));
    }
  }
}

void wide_linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias, torch::Tensor& y) {
  for_wide_blocks(x.size(0), weight,
                  [&](int64_t row, int64_t rows, int64_t begin, int64_t count, const torch::Tensor& stretch) {
                    const torch::Tensor input = wide_buffer(1, rows, x.size(1)).copy_(x.narrow(0, row, rows));
                    torch::Tensor part = wide_buffer(2, rows, count);
                    at::mm_out(part, input, stretch.t());
                    if (bias.defined()) part.add_(bias.narrow(0, begin, count));
                    y.narrow(0, row, rows).narrow(1, begin, count).copy_(part);
                  });
}

/// x W^T + b with a gradient for x alone.
struct FrozenProduct : torch::autograd::Function<FrozenProduct> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                               const torch::Tensor& weight, const std::optional<torch::Tensor>& bias) {
    ctx->save_for_backward({weight});
    return linear_rows(x, weight, bias.value_or(torch::Tensor()));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {back_rows(grads[0], ctx->get_saved_variables()[0]), {}, {}};
  }
};

const float* data_or_null(const torch::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<float>() : nullptr; }

/// Splits the output columns of a GEMV over threads.
template <class Body>
void for_columns(int64_t in, int64_t out, const Body& body) {
  const int64_t grain = std::max<int64_t>(kGemvGrain / std::max<int64_t>(in, 1), 1);
  at::parallel_for(0, out, grain, body);
}

constexpr int64_t kThinRank = 16;       // more: a GEMM library is as fast
constexpr int64_t kThinRows = 16;       // rows whose second reading comes from the cache
constexpr int64_t kThinTaskRows = 128;  // rows per task

bool is_thin(const torch::Tensor& x, const torch::Tensor& thin, int64_t rank) {
  auto fits = [](const torch::Tensor& t) {
    return t.is_cpu() && t.scalar_type() == torch::kFloat32 && (t.stride(1) == 1 || t.size(1) == 1);
  };
  return rank > 0 && rank <= kThinRank && fits(x) && fits(thin);
}

}  // namespace

bool multiplies_wide(const torch::Tensor& x) {
  static const bool generic = at::get_cpu_capability() != "AVX512";
  return generic && x.is_cpu() && x.scalar_type() == torch::kBFloat16;
}

const KernelTable& kernels() {
#if defined(__x86_64__)
  static const KernelTable& table = [&]() -> const KernelTable& {
    const std::string set = at::get_cpu_capability();
    if (set == "DEFAULT" || !kAvx2Kernels.gemv_f32 || !__builtin_cpu_supports("fma")) return kGenericKernels;
    const bool wide = set == "AVX512" && kAvx512Kernels.gemv_f32 && __builtin_cpu_supports("avx512vnni");
    return wide ? kAvx512Kernels : kAvx2Kernels;
  }();
  return table;
#else
  return kGenericKernels;
#endif
}

namespace {

using Number = AlikeRows::Number;

/// Whether its rows lie one behind the other, at any distance.
bool has_rows(const torch::Tensor& t) { return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1); }

/// Whether own kernels take a large product of these.
bool multiplies_own(const torch::Tensor& x, const torch::Tensor& weight) {
  return products() == Products::kOwn && x.is_cpu() && x.scalar_type() == torch::kFloat32 &&
         weight.scalar_type() == torch::kFloat32 && has_rows(x) && has_rows(weight) && weight.numel() > 0;
}

/// y = onto + x W^T, or onto + x W when `back`. onto: a bias [out], y itself, or undefined.
void own_product(const torch::Tensor& x, const torch::Tensor& weight, bool back, const torch::Tensor& onto,
                 const torch::Tensor& y) {
  const int64_t rows = x.size(0), depth = x.size(1), out = y.size(1);
  const float *x_data = x.data_ptr<float>(), *w_data = weight.data_ptr<float>(), *onto_data = data_or_null(onto);
  const int64_t onto_stride = onto.defined() && onto.dim() == 2 ? onto.stride(0) : 0;
  float* y_data = y.data_ptr<float>();
  // Columns are parted first: what is packed of a weight serves all rows of a part.
  const int64_t panels = (out + kGemmPanel - 1) / kGemmPanel;
  const int64_t threads = std::clamp<int64_t>(rows * depth * out / kGemmGrain, 1, at::get_num_threads());
  const int64_t across = std::min(panels, threads);
  const int64_t down = std::clamp<int64_t>(threads / across, 1, std::max<int64_t>(1, rows / kGemmPanel));
  at::parallel_for(0, across * down, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t column = part % across, row = part / across, top = row * rows / down;
      kernels().gemm_f32(x_data + top * x.stride(0), x.stride(0), (row + 1) * rows / down - top, w_data,
                         weight.stride(0), back, onto_data ? onto_data + top * onto_stride : nullptr, onto_stride,
                         y_data + top * y.stride(0), y.stride(0), depth, column * panels / across * kGemmPanel,
                         std::min(out, (column + 1) * panels / across * kGemmPanel));
    }
  });
}

/// Whether the library rounds all rows of a large product alike: one output makes it a product with a vector, which
/// rounds as suits its length, and narrow rows that begin at other places within 16 bytes are loaded otherwise.
bool library_is_alike(const torch::Tensor& weight) { return weight.size(0) > 1 && weight.size(1) % 4 == 0; }

/// Whether the kernels that read a weight once take a product of so many rows.
bool are_few(const torch::Tensor& x, const torch::Tensor& weight) {
  if (AlikeRows::now() == Number::kAny) return x.size(0) <= kGemvRows;
  return AlikeRows::now() == Number::kFew || !(multiplies_own(x, weight) || library_is_alike(weight));
}

/// The kernels that read a weight once.
torch::Tensor few_rows(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  const torch::Tensor input = x.to(torch::kFloat32).contiguous();
  const torch::Tensor offset = bias.defined() ? bias.to(torch::kFloat32) : bias;
  torch::Tensor y = torch::empty({rows, out}, torch::kFloat32);
  const float* x_data = input.data_ptr<float>();
  const float* bias_data = data_or_null(offset);
  float* y_data = y.data_ptr<float>();
  const KernelTable& table = kernels();
  if (x.scalar_type() == torch::kFloat32) {
    const float* w = weight.data_ptr<float>();
    for_columns(in, out, [&](int64_t begin, int64_t end) {
      table.gemv_f32(x_data, rows, w, bias_data, y_data, in, out, begin, end);
    });
    return y;
  }
  const auto* w = reinterpret_cast<const uint16_t*>(weight.data_ptr<at::BFloat16>());
  for_columns(in, out, [&](int64_t begin, int64_t end) {
    table.gemv_bf16(x_data, rows, w, bias_data, y_data, in, out, begin, end);
  });
  return y.to(x.scalar_type());
}

/// `x` with rows of zeros behind it, as many as AlikeRows wants for the library's products; undefined where it needs
/// none.
torch::Tensor padded(const torch::Tensor& x) {
  const int64_t missing = AlikeRows::kRowsPerThread * at::get_num_threads() - x.size(0);
  if (AlikeRows::now() != Number::kMany || !x.is_cpu() || missing <= 0) return {};
  return torch::cat({x, torch::zeros({missing, x.size(1)}, x.options())});
}

std::atomic<Products>& chosen_products() {
  static std::atomic<Products> chosen = &kernels() == &kGenericKernels ? Products::kLibrary : Products::kOwn;
  return chosen;
}

}  // namespace

Products products() { return chosen_products().load(std::memory_order_relaxed); }
void set_products(Products products) { chosen_products() = products; }

torch::Tensor linear_rows(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  if (wants_gradient(x, weight)) {
    const bool own = multiplies_own(x, weight) || (multiplies_wide(x) && weight.scalar_type() == x.scalar_type());
    if (!own || weight.requires_grad()) return at::linear(x, weight, bias);
    return FrozenProduct::apply(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  }
  torch::Tensor y = torch::empty({x.size(0), weight.size(0)}, x.options().requires_grad(false));
  linear_into(y, x, weight, bias);
  return y;
}

void linear_into(torch::Tensor& y, const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  const torch::NoGradGuard no_grad;
  const auto dtype = x.scalar_type();
  const bool same = weight.scalar_type() == dtype;
  if (x.size(0) > 0 && are_few(x, weight) && x.is_cpu() && weight.is_contiguous() && same &&
      (dtype == torch::kFloat32 || dtype == torch::kBFloat16)) {
    y.copy_(few_rows(x, weight, bias));
  } else if (multiplies_own(x, weight)) {
    own_product(x, weight, /*back=*/false, bias, y);
  } else if (multiplies_wide(x) && same) {
    wide_linear(x, weight, bias, y);
  } else if (const torch::Tensor more = library_is_alike(weight) ? padded(x) : torch::Tensor(); more.defined()) {
    y.copy_(at::linear(more, weight, bias).narrow(0, 0, x.size(0)));
  } else {
    at::linear_out(y, x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  }
}

torch::Tensor back_rows(const torch::Tensor& g, const torch::Tensor& weight) {
  torch::Tensor x = torch::empty({g.size(0), weight.size(1)}, g.options().requires_grad(false));
  back_into(x, g, weight);
  return x;
}

void back_into(torch::Tensor& x, const torch::Tensor& g, const torch::Tensor& weight) {
  const torch::NoGradGuard no_grad;
  if (multiplies_own(g, weight)) return own_product(g, weight, /*back=*/true, {}, x);
  if (!multiplies_wide(g)) {
    at::mm_out(x, g, weight);
    return;
  }
  for_wide_blocks(
      g.size(0), weight, [&](int64_t row, int64_t rows, int64_t begin, int64_t count, const torch::Tensor& stretch) {
        const torch::Tensor part = wide_buffer(1, rows, count).copy_(g.narrow(0, row, rows).narrow(1, begin, count));
        torch::Tensor sum = wide_buffer(2, rows, weight.size(1));
        at::addmm_out(sum, sum, part, stretch, begin == 0 ? 0.0 : 1.0);
        if (begin + count == g.size(1)) x.narrow(0, row, rows).copy_(sum);
      });
}

torch::Tensor thin_dots(const torch::Tensor& x, const torch::Tensor& a) {
  const int64_t rank = a.size(0), d = a.size(1);
  if (!is_thin(x, a, rank)) return linear_rows(x, a, {});
  const torch::Tensor rows = a.contiguous();
  torch::Tensor u = torch::empty({x.size(0), rank}, x.options().requires_grad(false));
  const float *x_data = x.data_ptr<float>(), *a_data = rows.data_ptr<float>();
  float* u_data = u.data_ptr<float>();
  at::parallel_for(0, x.size(0), kThinTaskRows, [&](int64_t begin, int64_t end) {
    kernels().thin_dots(x_data, x.stride(0), a_data, rank, d, /*scale=*/1.0f, u_data, rank, begin, end);
  });
  return u;
}

void thin_add(const torch::Tensor& g, const torch::Tensor& a, double scale, torch::Tensor y) {
  const int64_t rank = a.size(0), d = a.size(1);
  if (!is_thin(y, g, rank)) {
    const bool own = multiplies_own(g, a) && has_rows(y) && y.scalar_type() == torch::kFloat32;
    if (own && AlikeRows::now() != Number::kFew) {
      own_product(scale == 1.0 ? g : g * scale, a, /*back=*/true, y, y);
    } else if (AlikeRows::now() != Number::kAny && is_thin(y, g, kThinRank)) {
      for (int64_t k = 0; k < rank; k += kThinRank) {
        const int64_t count = std::min(kThinRank, rank - k);
        thin_add(g.narrow(1, k, count), a.narrow(0, k, count), scale, y);
      }
    } else if (multiplies_wide(g)) {
      y.add_(back_rows(g, a), scale);
    } else {
      y.addmm_(g, a, 1.0, scale);
    }
    return;
  }
  const torch::Tensor rows = a.contiguous();
  const float *g_data = g.data_ptr<float>(), *a_data = rows.data_ptr<float>();
  float* y_data = y.data_ptr<float>();
  at::parallel_for(0, y.size(0), kThinTaskRows, [&](int64_t begin, int64_t end) {
    kernels().thin_add(g_data, g.stride(0), a_data, rank, d, static_cast<float>(scale), y_data, y.stride(0), begin,
                       end);
  });
}

torch::Tensor thin_outer(const torch::Tensor& g, const torch::Tensor& x, double scale, const torch::Tensor& a,
                         torch::Tensor dots) {
  const int64_t rank = g.size(1), d = x.size(1), count = x.size(0);
  if (!is_thin(x, g, rank)) {
    const bool own = multiplies_own(g, x);
    if (dots.defined() && own && has_rows(a) && has_rows(dots)) {
      own_product(x, scale == 1.0 ? a : a * scale, /*back=*/false, {}, dots);
    } else if (dots.defined()) {
      at::addmm_out(dots, dots, x, a.t(), 0.0, scale);
    }
    torch::Tensor sums = own ? back_rows(g.t().contiguous(), x) : at::mm(g.t(), x);
    if (sums.element_size() == 2) sums = sums.to(torch::kFloat32);
    return scale == 1.0 ? sums : sums.mul_(scale);
  }
  const torch::Tensor rows = dots.defined() ? a.contiguous() : a;
  const int64_t tasks = std::clamp<int64_t>(count / kThinTaskRows, 1, at::get_num_threads());
  torch::Tensor parts = torch::zeros({tasks, rank, d}, x.options().requires_grad(false));
  const float *g_data = g.data_ptr<float>(), *x_data = x.data_ptr<float>(), *a_data = data_or_null(rows);
  float* dots_data = dots.defined() ? dots.data_ptr<float>() : nullptr;
  float* parts_data = parts.data_ptr<float>();
  const float factor = static_cast<float>(scale);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t stop = (task + 1) * count / tasks;
      for (int64_t begin = task * count / tasks; begin < stop; begin += kThinRows) {
        const int64_t end = std::min(begin + kThinRows, stop);
        if (dots_data) {
          kernels().thin_dots(x_data, x.stride(0), a_data, rank, d, factor, dots_data, dots.stride(0), begin, end);
        }
        kernels().thin_outer(g_data, g.stride(0), x_data, x.stride(0), rank, d, factor, parts_data + task * rank * d,
                             begin, end);
      }
    }
  });
  return tasks == 1 ? parts.squeeze(0) : parts.sum(0);
}

torch::Tensor linear_rows_int8(const torch::Tensor& x, const torch::Tensor& quantized, const torch::Tensor& scales,
                               const torch::Tensor& bias) {
  MOESAIC_CHECK(
      !(torch::GradMode::is_enabled() && x.requires_grad()), UsageError,
      "int8 weights are for decoding only: a gradient was asked for. Hint: load the model without --quantize");
  const int64_t rows = x.size(0), in = x.size(1), out = quantized.size(0);
  if (!x.is_cpu()) return at::linear(x, (quantized.to(torch::kFloat32) * scales.unsqueeze(1)).to(x.dtype()), bias);

  const torch::Tensor input = x.to(torch::kFloat32).contiguous();
  const torch::Tensor offset = bias.defined() ? bias.to(torch::kFloat32) : bias;
  const int8_t* q = quantized.data_ptr<int8_t>();
  const float* scale_data = scales.data_ptr<float>();
  const KernelTable& table = kernels();
  torch::Tensor y = torch::empty({rows, out}, torch::kFloat32);
  const float* x_data = input.data_ptr<float>();
  const float* bias_data = data_or_null(offset);
  float* y_data = y.data_ptr<float>();
  const auto number = AlikeRows::now();
  const bool many = number == Number::kMany || (number == Number::kAny && rows > kGemvRowsInt8);
  if (many && &table == &kAvx512Kernels) {
    const int64_t blocks = (in + kInt8Block - 1) / kInt8Block;
    std::vector<int8_t> x_int8(rows * blocks * kInt8Block);
    std::vector<float> x_scales(rows * blocks);
    std::vector<int32_t> offsets(rows * blocks);
    at::parallel_for(0, rows, std::max<int64_t>(kGemvGrain / in, 1), [&](int64_t begin, int64_t end) {
      table.quantize_blocks(x_data, x_int8.data(), x_scales.data(), offsets.data(), in, begin, end);
    });
    at::parallel_for(0, (out + kGemmPanel - 1) / kGemmPanel, 2, [&](int64_t begin, int64_t end) {
      table.gemm_blocks(x_int8.data(), x_scales.data(), offsets.data(), rows, q, scale_data, bias_data, y_data, in, out,
                        begin * kGemmPanel, std::min(out, end * kGemmPanel));
    });
    return y.to(x.dtype());
  }
  const int64_t stride = in + in % 2;
  std::vector<int16_t> x_int16(rows * stride);
  std::vector<float> x_scales(rows);
  at::parallel_for(0, rows, std::max<int64_t>(kGemvGrain / in, 1), [&](int64_t begin, int64_t end) {
    table.quantize_int16(x_data, x_int16.data(), stride, x_scales.data(), in, begin, end);
  });
  if (rows <= kGemvRowsInt8) {
    for_columns(in, out, [&](int64_t begin, int64_t end) {
      table.gemv_int8(x_int16.data(), stride, x_scales.data(), rows, q, scale_data, bias_data, y_data, in, out, begin,
                      end);
    });
  } else {
    at::parallel_for(0, out, kGemmColumns, [&](int64_t begin, int64_t end) {
      table.gemm_int8(x_int16.data(), stride, x_scales.data(), rows, q, scale_data, bias_data, y_data, in, out, begin,
                      end);
    });
  }
  return y.to(x.dtype());
}

std::pair<torch::Tensor, torch::Tensor> quantize_rows_int8(const torch::Tensor& weight) {
  torch::NoGradGuard no_grad;
  const int64_t out = weight.size(0), in = weight.size(1);
  torch::Tensor quantized = torch::empty({out, in}, torch::kInt8), scales = torch::empty({out}, torch::kFloat32);
  int8_t* target = quantized.data_ptr<int8_t>();
  float* scale_data = scales.data_ptr<float>();
  const int64_t part = std::max<int64_t>(kQuantizedPart / in, 1);
  for (int64_t first = 0; first < out; first += part) {
    const int64_t rows = std::min(part, out - first);
    const torch::Tensor wide = weight.narrow(0, first, rows).to(torch::kCPU, torch::kFloat32).contiguous();
    const float* source = wide.data_ptr<float>();
    at::parallel_for(0, rows, std::max<int64_t>(kGemvGrain / in, 1), [&](int64_t begin, int64_t end) {
      kernels().quantize_int8(source, target + first * in, scale_data + first, in, begin, end);
    });
  }
  return {quantized.to(weight.device()), scales.to(weight.device())};
}

}  // namespace moesaic::nn
