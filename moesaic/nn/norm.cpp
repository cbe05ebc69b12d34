#include "moesaic/nn/norm.h"

#include <ATen/Parallel.h>

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

struct FusedRmsNorm : torch::autograd::Function<FusedRmsNorm> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& input,
                               const torch::Tensor& weight, double eps, double offset) {
    torch::Tensor x = input.contiguous();
    auto [y, rstd] = fused_forward(x, weight, eps, offset);
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
    if (ctx->needs_input_grad(0)) {
      dx = at::empty_like(x);
      const float* dy_data = dy.data_ptr<float>();
      const float* x_data = x.data_ptr<float>();
      const float* weight_data = weight.data_ptr<float>();
      const float* rstd_data = rstd.data_ptr<float>();
      float* dx_data = dx.data_ptr<float>();
      at::parallel_for(0, rows, row_grain(d), [&](int64_t begin, int64_t end) {
        kernels().rms_norm_backward(dy_data, x_data, weight_data, offset, rstd_data, dx_data, d, begin, end);
      });
    }
    if (ctx->needs_input_grad(1)) {
      d_weight = (dy.view({rows, d}) * x.view({rows, d}) * rstd.unsqueeze(1)).sum(0);
    }
    return {dx, d_weight, {}, {}};
  }
};

}  // namespace

torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps, double offset) {
  const bool fused = x.is_cpu() && x.scalar_type() == torch::kFloat32 && weight.scalar_type() == torch::kFloat32 &&
                     weight.is_contiguous();
  if (fused) {
    const bool grad = torch::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad());
    return grad ? FusedRmsNorm::apply(x, weight, eps, offset)
                : fused_forward(x.contiguous(), weight, eps, offset).first;
  }
  const auto wide = x.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const torch::Tensor x_wide = x.to(wide);
  const torch::Tensor normed = x_wide * at::rsqrt(x_wide.square().mean(-1, /*keepdim=*/true) + eps);
  // As the families' authors round in half precision: Gemma multiplies before the cast, the others after it.
  if (offset != 0.0) return (normed * (weight.to(wide) + offset)).to(x.dtype());
  return normed.to(x.dtype()) * weight;
}

RmsNormImpl::RmsNormImpl(int64_t d, double eps, double offset, const torch::TensorOptions& options)
    : eps_(eps), offset_(offset) {
  weight = register_parameter("weight", torch::empty({d}, options), /*requires_grad=*/false);
}

}  // namespace moesaic::nn
