#include "moesaic/nn/feed_forward.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/dropout.h"
#include "moesaic/nn/half_rows.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/split.h"

namespace moesaic::nn {
namespace {

torch::Tensor activation(const torch::Tensor& x, GluKind kind) {
  switch (kind) {
    case GluKind::kSilu: return at::silu(x);
    case GluKind::kGeluTanh: return at::gelu(x, "tanh");
    case GluKind::kRelu: break;
  }
  return at::relu(x);
}

int64_t row_grain(int64_t f) { return std::max<int64_t>((8 << 10) / f, 1); }

/// act(gate) * up; in bfloat16 act(gate) is rounded first, as by one operator behind the other.
torch::Tensor fused_forward(const torch::Tensor& gate_up, GluKind kind) {
  const int64_t rows = gate_up.size(0), f = gate_up.size(1) / 2;
  torch::Tensor y = at::empty({rows, f}, gate_up.options().requires_grad(false));
  if (gate_up.scalar_type() == torch::kFloat32) {
    const float* source = gate_up.data_ptr<float>();
    float* target = y.data_ptr<float>();
    at::parallel_for(0, rows, row_grain(f),
                     [&](int64_t begin, int64_t end) { kernels().glu(source, target, f, kind, begin, end); });
    return y;
  }
  const auto* source = gate_up.data_ptr<at::BFloat16>();
  auto* target = y.data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, row_grain(f), [&](int64_t begin, int64_t end) {
    std::vector<float> in(2 * f, 1.0f), act(f);  // up is one
    for (int64_t row = begin; row < end; ++row) {
      const at::BFloat16* up = source + row * 2 * f + f;
      at::BFloat16* y_row = target + row * f;
      widen(source + row * 2 * f, in.data(), f);
      kernels().glu(in.data(), act.data(), f, kind, 0, 1);
      narrow(act.data(), y_row, f);
      for (int64_t i = 0; i < f; ++i) y_row[i] = at::BFloat16(static_cast<float>(y_row[i]) * static_cast<float>(up[i]));
    }
  });
  return y;
}

/// The gradient of contiguous rows of gate_up.
torch::Tensor rows_backward(const torch::Tensor& dy, const torch::Tensor& gate_up, GluKind kind) {
  const int64_t rows = gate_up.size(0), f = gate_up.size(1) / 2;
  torch::Tensor d_gate_up = at::empty_like(gate_up);
  if (gate_up.scalar_type() == torch::kFloat32) {
    const float *dy_data = dy.data_ptr<float>(), *source = gate_up.data_ptr<float>();
    float* target = d_gate_up.data_ptr<float>();
    at::parallel_for(0, rows, row_grain(f), [&](int64_t begin, int64_t end) {
      kernels().glu_backward(dy_data, source, target, f, kind, begin, end);
    });
    return d_gate_up;
  }
  const auto *dy_data = dy.data_ptr<at::BFloat16>(), *source = gate_up.data_ptr<at::BFloat16>();
  auto* target = d_gate_up.data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, row_grain(f), [&](int64_t begin, int64_t end) {
    std::vector<float> dy_row(f), in(2 * f), out(2 * f);
    for (int64_t row = begin; row < end; ++row) {
      widen(dy_data + row * f, dy_row.data(), f);
      widen(source + row * 2 * f, in.data(), 2 * f);
      kernels().glu_backward(dy_row.data(), in.data(), out.data(), f, kind, 0, 1);
      narrow(out.data(), target + row * 2 * f, 2 * f);
    }
  });
  return d_gate_up;
}

/// w_n x_n in float32, rounded to x's dtype; `w` may be undefined: x.
torch::Tensor weighted(const torch::Tensor& x, const torch::Tensor& w) {
  return w.defined() ? (x * w.unsqueeze(1)).to(x.scalar_type()) : x;
}

/// Saves gate_up and the weights of rows alone; the activation is computed again.
struct GluFunction : torch::autograd::Function<GluFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& input,
                               const std::optional<torch::Tensor>& weights, int64_t kind) {
    const torch::Tensor gate_up = input.contiguous(), row_weights = weights.value_or(torch::Tensor());
    ctx->save_for_backward({gate_up, row_weights});
    ctx->saved_data["kind"] = kind;
    return weighted(fused_forward(gate_up, static_cast<GluKind>(kind)), row_weights);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &gate_up = saved[0], &row_weights = saved[1], dy = grads[0].contiguous();
    const auto kind = static_cast<GluKind>(ctx->saved_data["kind"].toInt());
    torch::Tensor d_weights;
    if (row_weights.defined() && ctx->needs_input_grad(1))
      d_weights = (dy * fused_forward(gate_up, kind)).sum(1, false, torch::kFloat32);
    return {rows_backward(weighted(dy, row_weights), gate_up, kind), d_weights, {}};
  }
};

}  // namespace

torch::Tensor gated_linear_unit(const torch::Tensor& gate_up, GluKind kind, const torch::Tensor& row_weights) {
  const auto dtype = gate_up.scalar_type();
  if (gate_up.is_cpu() && (dtype == torch::kFloat32 || dtype == torch::kBFloat16) && kind != GluKind::kRelu) {
    if (torch::GradMode::is_enabled() &&
        (gate_up.requires_grad() || (row_weights.defined() && row_weights.requires_grad()))) {
      return GluFunction::apply(gate_up, row_weights.defined() ? std::optional(row_weights) : std::nullopt,
                                static_cast<int64_t>(kind));
    }
    return weighted(fused_forward(gate_up.contiguous(), kind), row_weights);
  }
  const int64_t f = gate_up.size(1) / 2;
  const auto parts = split_columns(gate_up, {f, f});
  return weighted(activation(parts[0], kind) * parts[1], row_weights);
}

FeedForwardImpl::FeedForwardImpl(int64_t hidden_size, int64_t intermediate_size, bool bias, GluKind kind, int64_t layer,
                                 const torch::TensorOptions& options, const FeedForwardNames& names)
    : names_(names),
      kind_(kind),
      layer_(layer),
      gate_up_(hidden_size, std::vector<int64_t>(gated() ? 2 : 1, intermediate_size), bias, options),
      down_(intermediate_size, {hidden_size}, bias, options) {
  register_module(names.gate, gate_up_.members()[0]);
  if (gated()) register_module(names.up, gate_up_.members()[1]);
  register_module(names.down, down_.members()[0]);
}

torch::Tensor FeedForwardImpl::branch(const torch::Tensor& x, Pass& pass, const torch::Tensor& row_weights) {
  if (!gated()) return weighted(branch_slot_.apply(activation(gate_up_.forward(x, pass), kind_), pass), row_weights);
  if (branch_slot_.empty()) return gated_linear_unit(gate_up_.forward(x, pass), kind_, row_weights);
  const auto parts = gate_up_.parts(x, pass);
  // Under AlikeRows a row rounds as without adapters that scale the branch of others.
  const bool alike = AlikeRows::now() != AlikeRows::Number::kAny && !torch::GradMode::is_enabled();
  torch::Tensor act = alike ? gated_linear_unit(torch::cat({parts[0], torch::ones_like(parts[0])}, 1), kind_)
                            : activation(parts[0], kind_);
  const auto& adapters = branch_slot_.adapters;
  for (size_t i = 0; i + 1 < adapters.size(); ++i) act = adapters[i]->forward(act, pass);
  return weighted(adapters.back()->forward_ffn(act, parts[1], pass), row_weights);
}

torch::Tensor FeedForwardImpl::forward(const torch::Tensor& x, Pass& pass, const torch::Tensor& row_weights) {
  MOESAIC_ASSERT(!row_weights.defined() || !down_.bias().defined());
  return down_.forward(drop_columns(branch(x, pass, row_weights), pass), pass);
}

bool FeedForwardImpl::adapted() const {
  return gate_up_.delta || down_.delta || gate_up_.scaled() || down_.scaled() || !branch_slot_.empty();
}

void FeedForwardImpl::add_sites(const std::string& path, Sites& sites) {
  const int64_t d = gate_up_.in(), f = down_.in();
  auto add = [&](const char* name, Role role, LinearGroup& group, int64_t index) {
    const std::string site = path + "." + name;
    const int64_t out = group.outs()[index];
    sites.linears.push_back({site, role, layer_, &group, index, group.in(), out});
    sites.scales.push_back({site, role, layer_, ScaleKind::kInput, &group.input_slot(index), 0, group.in(), d});
    sites.scales.push_back({site, role, layer_, ScaleKind::kOutput, &group.output_slot(index), 0, out, d});
  };
  add(names_.gate, Role::kGate, gate_up_, 0);
  if (gated()) add(names_.up, Role::kUp, gate_up_, 1);
  add(names_.down, Role::kDown, down_, 0);
  sites.scales.push_back({path + "." + names_.down, Role::kDown, layer_, ScaleKind::kFfn, &branch_slot_, 0, f, d});
}

int64_t FeedForwardImpl::saved_per_row(bool whole) const {
  int64_t numbers = 2 * down_.in();  // gate and up, or what stands before and behind the activation
  if (whole || gate_up_.delta) numbers += gate_up_.in();  // the normed input
  if (whole || down_.delta) numbers += down_.in();        // the branch
  for (const LinearGroup* group : {&gate_up_, &down_}) {
    if (group->delta) numbers += group->delta->saved_per_row();
  }
  return numbers;
}

void FeedForwardImpl::quantize_int8() {
  gate_up_.quantize_int8();
  down_.quantize_int8();
}

}  // namespace moesaic::nn
