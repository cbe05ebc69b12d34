#include "moesaic/moe/scale.h"

#include "moesaic/base/check.h"

namespace moesaic::moe {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Gradient of softmax logits from the gradient of its output: s (gs - sum_e s_e gs_e).
torch::Tensor softmax_backward(const torch::Tensor& gs, const torch::Tensor& s) {
  return at::_softmax_backward_data(gs, s, -1, s.scalar_type());
}

/// act * up * m with m = softmax(act W_r^T) V. act, up: [N, f]; W_r, V: [E, f]. Saves act, up and s; m is made again in
/// the backward pass.
struct MovFfn : torch::autograd::Function<MovFfn> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& act, const torch::Tensor& up,
                               const torch::Tensor& router, const torch::Tensor& vectors) {
    const torch::Tensor s = at::linear(act, router).softmax(-1);
    ctx->save_for_backward({act, up, router, vectors, s});
    return at::mm(s, vectors).mul_(act).mul_(up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor &act = saved[0], &up = saved[1], &router = saved[2], &vectors = saved[3], &s = saved[4];
    const torch::Tensor gu = grads[0] * up;  // gradient of act * m, [N, f]
    const torch::Tensor gm = gu * act;       // gradient of m
    const torch::Tensor glogits = softmax_backward(at::mm(gm, vectors.t()), s);
    const torch::Tensor gvectors = at::mm(s.t(), gm);
    const torch::Tensor grouter = at::mm(glogits.t(), act);
    const torch::Tensor m = at::mm(s, vectors);
    torch::Tensor gup;
    if (ctx->needs_input_grad(1)) gup = at::mul(grads[0], act).mul_(m);
    torch::Tensor gact;
    if (ctx->needs_input_grad(0)) gact = gm.copy_(gu).mul_(m).addmm_(glogits, router);
    return {gact, gup, grouter, gvectors};
  }
};

/// y * m with m[n, h] = softmax(y[n, h] W_r^T) V[:, h]. y: [N, H, k]; W_r: [E, k]; V: [E, H, k].
struct MovHeads : torch::autograd::Function<MovHeads> {
  static torch::Tensor merge(const torch::Tensor& s, const torch::Tensor& vectors) {
    return at::bmm(s.transpose(0, 1), vectors.transpose(0, 1)).transpose(0, 1);  // [N, H, k]
  }

  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& y, const torch::Tensor& router,
                               const torch::Tensor& vectors) {
    const torch::Tensor s = at::linear(y, router).softmax(-1);  // [N, H, E]
    ctx->save_for_backward({y, router, vectors, s});
    return y * merge(s, vectors);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor &y = saved[0], &router = saved[1], &vectors = saved[2], &s = saved[3];
    const torch::Tensor gm = (grads[0] * y).transpose(0, 1);  // [H, N, k]
    const torch::Tensor gvectors = at::bmm(s.permute({1, 2, 0}), gm).transpose(0, 1);
    const torch::Tensor gs = at::bmm(gm, vectors.permute({1, 2, 0})).transpose(0, 1).contiguous();
    const torch::Tensor glogits = softmax_backward(gs, s);
    const torch::Tensor grouter = at::mm(glogits.flatten(0, 1).t(), y.reshape({-1, y.size(2)}));
    torch::Tensor gy;
    if (ctx->needs_input_grad(0)) gy = grads[0] * merge(s, vectors) + at::matmul(glogits, router);
    return {gy, grouter, gvectors};
  }
};

}  // namespace

ScaleExperts::ScaleExperts(torch::Tensor v, Router r, double effect)
    : vectors(std::move(v)), router(std::move(r)), effect_(effect) {}

torch::Tensor ScaleExperts::merge(const torch::Tensor& weights) const {
  // Residual top-k: 1 + sum w (v - 1), so that a small kept mass does not shrink the activation.
  const bool residual = router.options.top_k > 0 && router.options.topk_mode == TopkMode::kResidual;
  const torch::Tensor v = residual ? vectors - 1 : vectors;
  torch::Tensor m;
  if (vectors.dim() == 2) {
    m = at::mm(weights, v);
  } else if (weights.dim() == 2) {
    m = at::mm(weights, v.flatten(1)).view({-1, v.size(1), v.size(2)});
  } else {
    m = at::bmm(weights.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1);
  }
  return residual ? m + 1 : m;
}

torch::Tensor ScaleExperts::merged(const torch::Tensor& own_input, nn::Pass& pass) const {
  torch::Tensor m;
  if (!router.defined()) {
    m = vectors.squeeze(0);
  } else if (router.options.input == RouterInput::kSentence || router.options.input == RouterInput::kLayerInput) {
    m = merge(router.route_from_pass(pass));
  } else {
    const int64_t rows_per_token = own_input.dim() == 3 ? own_input.size(1) : 1;
    const torch::Tensor logits = router.logits(own_input, pass);
    const torch::Tensor weights = router.route(logits.flatten(0, -2), pass, rows_per_token);
    m = merge(weights.view(logits.sizes()));
  }
  torch::Tensor weight = pass.adapter_weight(column);  // [N, 1]
  if (!weight.defined()) return effect_ == 1.0 ? m : 1 + effect_ * (m - 1);
  if (own_input.dim() == 3) weight = weight.unsqueeze(2);
  return 1 + effect_ * weight * (m - 1);
}

bool ScaleExperts::fused(const torch::Tensor& input, const nn::Pass& pass) const {
  return router.defined() && router.options.plain() && router.options.temperature == 1.0 && effect_ == 1.0 &&
         pass.routing == nullptr && !(pass.mixture.defined() && column >= 0) &&
         input.scalar_type() == vectors.scalar_type();
}

int64_t ScaleExperts::saved_per_row() const { return vectors.size(0) * (vectors.dim() == 3 ? vectors.size(1) : 1); }

torch::Tensor ScaleExperts::forward(const torch::Tensor& y, nn::Pass& pass) {
  if (y.dim() == 3 && vectors.dim() == 2) return forward(y.flatten(1), pass).view(y.sizes());
  if (y.dim() == 3 && fused(y, pass)) return MovHeads::apply(y, router.weight, vectors);
  const torch::Tensor m = merged(y, pass);
  return (y.to(m.scalar_type()) * m).to(y.scalar_type());
}

torch::Tensor ScaleExperts::forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass& pass) {
  if (fused(act, pass)) return MovFfn::apply(act, up, router.weight, vectors);
  const bool product = router.defined() && router.options.input == RouterInput::kFfnProduct;
  const torch::Tensor m = merged(product ? act * up : act, pass);
  return (act.to(m.scalar_type()) * m).to(act.scalar_type()) * up;
}

}  // namespace moesaic::moe
