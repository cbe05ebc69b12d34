#include "moesaic/nn/rope.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/half_rows.h"
#include "moesaic/nn/kernel_table.h"

namespace moesaic::nn {
namespace {

constexpr double kTwoPi = 2.0 * M_PI;

/// 1 / theta^(2i/k), i = 0 .. k/2-1, in float32 as transformers computes it.
torch::Tensor base_frequencies(double theta, int64_t head_dim) {
  return 1.0 / at::pow(theta, torch::arange(0, head_dim, 2, torch::kFloat32) / static_cast<double>(head_dim));
}

/// Long wavelengths are divided by `factor`, short ones kept, those between interpolated.
torch::Tensor llama3_frequencies(const RopeConfig& config, const torch::Tensor& base) {
  const double original = static_cast<double>(config.original_max_position);
  const torch::Tensor wavelength = kTwoPi / base;
  const torch::Tensor slow = wavelength > original / config.low_freq_factor;
  const torch::Tensor fast = wavelength < original / config.high_freq_factor;
  const torch::Tensor smooth =
      (original / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
  const torch::Tensor between = (1.0 - smooth) * base / config.factor + smooth * base;
  return at::where(slow, base / config.factor, at::where(fast, base, between));
}

/// Dimensions that turn more than beta_fast times within the original length are kept, those below beta_slow divided by
/// `factor`, a linear ramp between.
torch::Tensor yarn_frequencies(const RopeConfig& config, int64_t head_dim, const torch::Tensor& base) {
  const double k = static_cast<double>(head_dim);
  auto dimension = [&](double turns) {  // where a dimension turns `turns` times
    return k * std::log(static_cast<double>(config.original_max_position) / (turns * kTwoPi)) /
           (2.0 * std::log(config.theta));
  };
  double low = dimension(config.beta_fast), high = dimension(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, k - 1.0);
  if (low == high) high += 0.001;  // no division by zero
  const torch::Tensor ramp = ((torch::arange(head_dim / 2, torch::kFloat32) - low) / (high - low)).clamp(0, 1);
  return base / config.factor * ramp + base * (1.0 - ramp);
}

double yarn_attention_factor(const RopeConfig& config) {
  if (config.attention_factor >= 0) return config.attention_factor;
  auto magnitude = [&](double mscale) {
    return config.factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(config.factor) + 1.0;
  };
  if (config.mscale != 0 && config.mscale_all_dim != 0) {
    return magnitude(config.mscale) / magnitude(config.mscale_all_dim);
  }
  return magnitude(1.0);
}

/// The rotation without autograd. float32 and bfloat16 on the CPU run fused.
torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& cos, const torch::Tensor& sin, double sign) {
  const int64_t rows = x.size(0), heads = x.size(1), k = x.size(2);
  if (x.is_cpu() && x.scalar_type() == torch::kFloat32) {
    const bool heads_contiguous = x.stride(2) == 1 && (heads == 1 || x.stride(1) == k);
    const torch::Tensor source = heads_contiguous ? x : x.contiguous();
    torch::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
    const float* source_data = source.data_ptr<float>();
    const float* cos_data = cos.data_ptr<float>();
    const float* sin_data = sin.data_ptr<float>();
    float* y_data = y.data_ptr<float>();
    const int64_t stride = source.stride(0);
    at::parallel_for(0, rows, std::max<int64_t>((16 << 10) / (heads * k), 1), [&](int64_t begin, int64_t end) {
      kernels().rope(source_data, stride, y_data, heads * k, cos_data, sin_data, static_cast<float>(sign), heads, k,
                     begin, end);
    });
    return y;
  }
  if (x.is_cpu() && x.scalar_type() == torch::kBFloat16) {
    const int64_t width = heads * k;
    const torch::Tensor source = x.contiguous();
    torch::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
    const auto* source_data = source.data_ptr<at::BFloat16>();
    const float *cos_data = cos.data_ptr<float>(), *sin_data = sin.data_ptr<float>();
    auto* y_data = y.data_ptr<at::BFloat16>();
    at::parallel_for(0, rows, std::max<int64_t>((16 << 10) / width, 1), [&](int64_t begin, int64_t end) {
      std::vector<float> in(width), out(width);
      for (int64_t row = begin; row < end; ++row) {
        widen(source_data + row * width, in.data(), width);
        kernels().rope(in.data(), width, out.data(), width, cos_data + row * k / 2, sin_data + row * k / 2,
                       static_cast<float>(sign), heads, k, 0, 1);
        narrow(out.data(), y_data + row * width, width);
      }
    });
    return y;
  }
  const torch::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1) * sign;  // [N, 1, k/2], float32
  const torch::Tensor first = x.narrow(2, 0, k / 2), second = x.narrow(2, k / 2, k / 2);
  return at::cat({first * c - second * s, second * c + first * s}, 2).to(x.dtype());
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x, const torch::Tensor& cos,
                               const torch::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, 1.0);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], -1.0), {}, {}};
  }
};

}  // namespace

Rope::Rope(RopeConfig config, int64_t head_dim) : config_(std::move(config)), head_dim_(head_dim) {
  MOESAIC_CHECK(head_dim > 0 && head_dim % 2 == 0, ConfigError, "rope: got head_dim {}, expected an even number",
                head_dim);
  const torch::Tensor base = base_frequencies(config_.theta, head_dim);
  if (config_.attention_factor >= 0) attention_factor_ = config_.attention_factor;
  if (config_.type == "default" || config_.type == "dynamic") {
    inverse_frequencies_ = base;
  } else if (config_.type == "linear") {
    inverse_frequencies_ = base / config_.factor;
  } else if (config_.type == "llama3") {
    inverse_frequencies_ = llama3_frequencies(config_, base);
  } else if (config_.type == "yarn") {
    inverse_frequencies_ = yarn_frequencies(config_, head_dim, base);
    attention_factor_ = yarn_attention_factor(config_);
  } else {
    throw ConfigError("rope: got type '" + config_.type + "', expected default, linear, dynamic, llama3 or yarn");
  }
}

torch::Tensor Rope::inverse_frequencies(int64_t length) const {
  if (config_.type != "dynamic" || length <= config_.original_max_position) return inverse_frequencies_;
  // theta' = theta (factor length / original - (factor - 1))^(k / (k - 2))
  const double k = static_cast<double>(head_dim_);
  const double growth =
      config_.factor * static_cast<double>(length) / static_cast<double>(config_.original_max_position) -
      (config_.factor - 1.0);
  return base_frequencies(config_.theta * std::pow(growth, k / (k - 2.0)), head_dim_);
}

RotaryTables Rope::tables(const torch::Tensor& positions, const std::vector<int64_t>& offsets,
                          const std::vector<int64_t>& lengths) const {
  torch::NoGradGuard no_grad;
  const torch::Tensor column = positions.to(torch::kFloat32).unsqueeze(1);  // [N, 1]
  torch::Tensor angles;
  if (config_.type == "dynamic") {
    std::vector<torch::Tensor> parts;
    for (size_t b = 0; b < lengths.size(); ++b) {
      parts.push_back(column.slice(0, offsets[b], offsets[b + 1]) *
                      inverse_frequencies(lengths[b]).to(column.device()));
    }
    angles = at::cat(parts);
  } else {
    angles = column * inverse_frequencies_.to(column.device());
  }
  RotaryTables tables{angles.cos(), angles.sin()};
  if (attention_factor_ != 1.0) {
    tables.cos *= attention_factor_;
    tables.sin *= attention_factor_;
  }
  return tables;
}

torch::Tensor apply_rope(const torch::Tensor& x, const RotaryTables& tables) {
  if (torch::GradMode::is_enabled() && x.requires_grad()) return RopeFunction::apply(x, tables.cos, tables.sin);
  return rotate(x, tables.cos, tables.sin, 1.0);
}

}  // namespace moesaic::nn
