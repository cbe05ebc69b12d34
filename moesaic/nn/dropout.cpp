#include "moesaic/nn/dropout.h"

namespace moesaic::nn {
namespace {

bool drops(const Pass& pass) { return pass.training && pass.dropout > 0; }

/// m / (1 - p) of this shape.
torch::Tensor factors(at::IntArrayRef shape, double p, const torch::TensorOptions& options, const Pass& pass) {
  return torch::empty(shape, options.requires_grad(false)).bernoulli_(1.0 - p, pass.generator).div_(1.0 - p);
}

struct ScaledColumns : torch::autograd::Function<ScaledColumns> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                               const torch::Tensor& factors, const torch::Tensor& segments) {
    ctx->save_for_backward({factors, segments});
    return x * factors.index_select(0, segments);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {grads[0] * saved[0].index_select(0, saved[1]), {}, {}};
  }
};

}  // namespace

torch::Tensor drop(const torch::Tensor& x, double p, const Pass& pass) {
  return pass.training && p > 0 ? x * factors(x.sizes(), p, x.options(), pass) : x;
}

torch::Tensor drop_columns(const torch::Tensor& x, const Pass& pass, const torch::Tensor& rows) {
  if (!drops(pass)) return x;
  const int64_t sequences = std::ssize(pass.offsets) - 1;
  return ScaledColumns::apply(x, factors({sequences, x.size(1)}, pass.dropout, x.options(), pass),
                              rows.defined() ? pass.segments.index_select(0, rows) : pass.segments);
}

torch::Tensor drop_keys(const torch::Tensor& v, const Pass& pass) {
  if (!drops(pass)) return v;
  return v * factors({v.size(0), v.size(1), 1}, pass.dropout, v.options(), pass);
}

}  // namespace moesaic::nn
