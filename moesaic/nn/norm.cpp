#include "moesaic/nn/norm.h"

#include "moesaic/nn/half_rows.h"
#include "moesaic/nn/kernel_table.h"

namespace moesaic::nn {
namespace {

constexpr int64_t kGrain = 16 << 10;  // elements per task

int64_t row_grain(int64_t d) { return std::max<int64_t>(kGrain / d, 1); }

/// y and rstd [rows] of a contiguous float32 x.
std::pair<torch::Tensor, torch::Tensor> fused_forward(const torch::Tensor& x, const torch::Tensor& weight, double eps,
                                                      double offset) {
  const int64_t d = x.size(-1), rows = x.numel() / d;
  torch::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
  torch::Tensor rstd = at::empty({rows}, x.options().requires_grad(false));
  const float* x_data = x.data_ptr<float>();
  const float* weight_data = weight.data_ptr<float>();
  float* y_data = y.data_ptr<float>();
  float* rstd_data = rstd.data_ptr<float>();
  at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
    kernels().rms_norm(x_data, weight_data, static_cast<float>(offset), static_cast<float>(eps), y_data, rstd_data, d,
                       begin, end);
  });
  return {y, rstd};
}

/// x / RMS(x) w of a contiguous bfloat16 x, rounded as the families' authors do: Gemma multiplies before the cast, the
/// others after it.
std::pair<torch::Tensor, torch::Tensor> half_forward(const torch::Tensor& x, const torch::Tensor& weight, double eps,
                                                     double offset) {
  const int64_t d = x.size(-1), rows = x.numel() / d;
  const bool once = offset != 0.0;
  const torch::Tensor wide_weight = weight.to(torch::kFloat32),
                      factor = once ? wide_weight : at::ones_like(wide_weight);
  torch::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
  torch::Tensor rstd = at::empty({rows}, wide_weight.options());
  const auto* x_data = x.data_ptr<at::BFloat16>();
  const float *weight_data = wide_weight.data_ptr<float>(), *factor_data = factor.data_ptr<float>();
  auto* y_data = y.data_ptr<at::BFloat16>();
  float* rstd_data = rstd.data_ptr<float>();
  at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
    std::vector<float> in(d), out(d);
    for (int64_t row = begin; row < end; ++row) {
      at::BFloat16* y_row = y_data + row * d;
      widen(x_data + row * d, in.data(), d);
      kernels().rms_norm(in.data(), factor_data, static_cast<float>(offset), static_cast<float>(eps), out.data(),
                         rstd_data + row, d, 0, 1);
      narrow(out.data(), y_row, d);
      for (int64_t i = 0; i < d && !once; ++i) y_row[i] = at::BFloat16(static_cast<float>(y_row[i]) * weight_data[i]);
    }
  });
  return {y, rstd};
}

/// dL/dx of contiguous rows.
torch::Tensor rows_backward(const torch::Tensor& dy, const torch::Tensor& x, const torch::Tensor& weight, float offset,
                            const torch::Tensor& rstd) {
  const int64_t d = x.size(-1), rows = x.numel() / d;
  torch::Tensor dx = at::empty_like(x);
  const torch::Tensor wide_weight = weight.to(torch::kFloat32);
  const float *weight_data = wide_weight.data_ptr<float>(), *rstd_data = rstd.data_ptr<float>();
  if (x.scalar_type() == torch::kFloat32) {
    const float *dy_data = dy.data_ptr<float>(), *x_data = x.data_ptr<float>();
    float* dx_data = dx.data_ptr<float>();
    at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
      kernels().rms_norm_backward(dy_data, x_data, weight_data, offset, rstd_data, dx_data, d, begin, end);
    });
    return dx;
  }
  const auto *dy_data = dy.data_ptr<at::BFloat16>(), *x_data = x.data_ptr<at::BFloat16>();
  auto* dx_data = dx.data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
    std::vector<float> dy_row(d), x_row(d), dx_row(d);
    for (int64_t row = begin; row < end; ++row) {
      widen(dy_data + row * d, dy_row.data(), d);
      widen(x_data + row * d, x_row.data(), d);
      kernels().rms_norm_backward(dy_row.data(), x_row.data(), weight_data, offset, rstd_data + row, dx_row.data(), d,
                                  0, 1);
      narrow(dx_row.data(), dx_data + row * d, d);
    }
  });
  return dx;
}

struct FusedRmsNorm : torch::autograd::Function<FusedRmsNorm> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& input,
                               const torch::Tensor& weight, double eps, double offset) {
    torch::Tensor x = input.contiguous();
    auto [y, rstd] = x.scalar_type() == torch::kFloat32 ? fused_forward(x, weight, eps, offset)
                                                        : half_forward(x, weight, eps, offset);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["offset"] = offset;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const float offset = static_cast<float>(ctx->saved_data["offset"].toDouble());
    const torch::Tensor dy = grads[0].contiguous();
    const int64_t d = x.size(-1), rows = x.numel() / d;
    torch::Tensor dx, d_weight;
    if (ctx->needs_input_grad(0)) dx = rows_backward(dy, x, weight, offset, rstd);
    if (ctx->needs_input_grad(1)) {
      d_weight = (dy.view({rows, d}) * x.view({rows, d}) * rstd.unsqueeze(1)).sum(0).to(weight.scalar_type());
    }
    return {dx, d_weight, {}, {}};
  }
};

}  // namespace

torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps, double offset) {
  const auto dtype = x.scalar_type();
  const bool fused = x.is_cpu() && weight.scalar_type() == dtype && weight.is_contiguous() &&
                     (dtype == torch::kFloat32 || dtype == torch::kBFloat16);
  if (!fused) {
    const auto wide = dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    const torch::Tensor x_wide = x.to(wide);
    const torch::Tensor normed = x_wide * at::rsqrt(x_wide.square().mean(-1, /*keepdim=*/true) + eps);
    if (offset != 0.0) return (normed * (weight.to(wide) + offset)).to(dtype);
    return normed.to(dtype) * weight;
  }
  if (torch::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad())) {
    return FusedRmsNorm::apply(x, weight, eps, offset);
  }
  return (dtype == torch::kFloat32 ? fused_forward : half_forward)(x.contiguous(), weight, eps, offset).first;
}

RmsNormImpl::RmsNormImpl(int64_t d, double eps, double offset, const torch::TensorOptions& options)
    : eps_(eps), offset_(offset) {
  weight = register_parameter("weight", torch::empty({d}, options), /*requires_grad=*/false);
}

}  // namespace moesaic::nn
