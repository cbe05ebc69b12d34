#include "moesaic/moe/scale.h"

#include "moesaic/base/check.h"
#include "moesaic/moe/wide_rows.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::moe {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Gradient of softmax logits from the gradient of its output: s (gs - sum_e s_e gs_e).
torch::Tensor softmax_backward(const torch::Tensor& gs, const torch::Tensor& s) {
  return at::_softmax_backward_data(gs, s, -1, s.scalar_type());
}

/// act * up * m with m = softmax(act W_r^T) V. act, up: [N, f]; W_r, V: [E, f] float32. Saves act, up and s; m is made
/// again in the backward pass.
struct MovFfn : torch::autograd::Function<MovFfn> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& act, const torch::Tensor& up,
                               const torch::Tensor& router, const torch::Tensor& vectors) {
    torch::Tensor s, y;
    if (act.scalar_type() == vectors.scalar_type()) {
      s = at::linear(act, router).softmax(-1);
      y = at::mm(s, vectors).mul_(act).mul_(up);
    } else {
      s = at::empty({act.size(0), vectors.size(0)}, vectors.options());
      y = at::empty(act.sizes(), act.options());
      for_wide_rows(act, [&](int64_t begin, int64_t count) {
        const torch::Tensor a = wide_rows(act, begin, count), weights = at::linear(a, router).softmax(-1);
        s.narrow(0, begin, count).copy_(weights);
        y.narrow(0, begin, count)
            .copy_(at::mm(weights, vectors).mul_(a).to(act.scalar_type()).mul_(up.narrow(0, begin, count)));
      });
    }
    ctx->save_for_backward({act, up, router, vectors, s});
    return y;
  }

  /// The gradients of act, up, router and vectors, all of one format.
  static variable_list gradients(const torch::Tensor& gy, const torch::Tensor& act, const torch::Tensor& up,
                                 const torch::Tensor& router, const torch::Tensor& vectors, const torch::Tensor& s,
                                 bool of_act, bool of_up) {
    const torch::Tensor gu = gy * up;   // gradient of act * m, [N, f]
    const torch::Tensor gm = gu * act;  // gradient of m
    const torch::Tensor glogits = softmax_backward(at::mm(gm, vectors.t()), s);
    const torch::Tensor gvectors = at::mm(s.t(), gm);
    const torch::Tensor grouter = at::mm(glogits.t(), act);
    const torch::Tensor m = at::mm(s, vectors);
    torch::Tensor gup, gact;
    if (of_up) gup = at::mul(gy, act).mul_(m);
    if (of_act) gact = gm.copy_(gu).mul_(m).addmm_(glogits, router);
    return {gact, gup, grouter, gvectors};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor &act = saved[0], &up = saved[1], &router = saved[2], &vectors = saved[3], &s = saved[4];
    const bool of_act = ctx->needs_input_grad(0), of_up = ctx->needs_input_grad(1);
    if (act.scalar_type() == vectors.scalar_type()) {
      return gradients(grads[0], act, up, router, vectors, s, of_act, of_up);
    }
    torch::Tensor gact = of_act ? at::empty(act.sizes(), act.options()) : torch::Tensor();
    torch::Tensor gup = of_up ? at::empty(up.sizes(), up.options()) : torch::Tensor();
    torch::Tensor grouter = at::zeros_like(router), gvectors = at::zeros_like(vectors);
    for_wide_rows(act, [&](int64_t begin, int64_t count) {
      auto wide = [&](const torch::Tensor& t) { return wide_rows(t, begin, count); };
      const auto part =
          gradients(wide(grads[0]), wide(act), wide(up), router, vectors, s.narrow(0, begin, count), of_act, of_up);
      if (of_act) gact.narrow(0, begin, count).copy_(part[0]);
      if (of_up) gup.narrow(0, begin, count).copy_(part[1]);
      grouter.add_(part[2]);
      gvectors.add_(part[3]);
    });
    return {gact, gup, grouter, gvectors};
  }
};

/// y * m with m[n, h] = softmax(y[n, h] W_r^T) V[:, h]. y: [N, H, k]; W_r: [E, k]; V: [E, H, k], both float32.
struct MovHeads : torch::autograd::Function<MovHeads> {
  static torch::Tensor merge(const torch::Tensor& s, const torch::Tensor& vectors) {
    return at::bmm(s.transpose(0, 1), vectors.transpose(0, 1)).transpose(0, 1);  // [N, H, k]
  }

  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& y, const torch::Tensor& router,
                               const torch::Tensor& vectors) {
    torch::Tensor s, scaled;  // s: [N, H, E]
    if (y.scalar_type() == vectors.scalar_type()) {
      s = at::linear(y, router).softmax(-1);
      scaled = y * merge(s, vectors);
    } else {
      s = at::empty({y.size(0), y.size(1), vectors.size(0)}, vectors.options());
      scaled = at::empty(y.sizes(), y.options());
      for_wide_rows(y, [&](int64_t begin, int64_t count) {
        const torch::Tensor wide = wide_rows(y, begin, count), weights = at::linear(wide, router).softmax(-1);
        s.narrow(0, begin, count).copy_(weights);
        scaled.narrow(0, begin, count).copy_(wide * merge(weights, vectors));
      });
    }
    ctx->save_for_backward({y, router, vectors, s});
    return scaled;
  }

  /// The gradients of y, router and vectors, all of one format.
  static variable_list gradients(const torch::Tensor& g, const torch::Tensor& y, const torch::Tensor& router,
                                 const torch::Tensor& vectors, const torch::Tensor& s, bool of_y) {
    const torch::Tensor gm = (g * y).transpose(0, 1);  // [H, N, k]
    const torch::Tensor gvectors = at::bmm(s.permute({1, 2, 0}), gm).transpose(0, 1);
    const torch::Tensor gs = at::bmm(gm, vectors.permute({1, 2, 0})).transpose(0, 1).contiguous();
    const torch::Tensor glogits = softmax_backward(gs, s);
    const torch::Tensor grouter = at::mm(glogits.flatten(0, 1).t(), y.reshape({-1, y.size(2)}));
    torch::Tensor gy;
    if (of_y) gy = g * merge(s, vectors) + at::matmul(glogits, router);
    return {gy, grouter, gvectors};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor &y = saved[0], &router = saved[1], &vectors = saved[2], &s = saved[3];
    const bool of_y = ctx->needs_input_grad(0);
    if (y.scalar_type() == vectors.scalar_type()) return gradients(grads[0], y, router, vectors, s, of_y);
    torch::Tensor gy = of_y ? at::empty(y.sizes(), y.options()) : torch::Tensor();
    torch::Tensor grouter = at::zeros_like(router), gvectors = at::zeros_like(vectors);
    for_wide_rows(y, [&](int64_t begin, int64_t count) {
      const auto part = gradients(wide_rows(grads[0], begin, count), wide_rows(y, begin, count), router, vectors,
                                  s.narrow(0, begin, count), of_y);
      if (of_y) gy.narrow(0, begin, count).copy_(part[0]);
      grouter.add_(part[1]);
      gvectors.add_(part[2]);
    });
    return {gy, grouter, gvectors};
  }
};

/// y * m in float32, rounded to y's format, and where `gated` times up. m: [N, ...] as y, or one for all rows. Saves y,
/// m and up as they are.
struct ScaledRows : torch::autograd::Function<ScaledRows> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& y, const torch::Tensor& m,
                               const torch::Tensor& up, bool gated) {
    ctx->save_for_backward(gated ? variable_list{y, m, up} : variable_list{y, m});
    if (y.scalar_type() == m.scalar_type()) return gated ? (y * m).mul_(up) : y * m;
    torch::Tensor scaled = at::empty(y.sizes(), y.options());
    for_wide_rows(y, [&](int64_t begin, int64_t count) {
      torch::Tensor part = scaled.narrow(0, begin, count);
      part.copy_(y.narrow(0, begin, count) * rows_of(m, y, begin, count));
      if (gated) part.mul_(up.narrow(0, begin, count));
    });
    return scaled;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor &y = saved[0], &m = saved[1];
    const bool gated = saved.size() == 3;
    torch::Tensor gy, gm, gup;
    if (ctx->needs_input_grad(0)) gy = at::empty(y.sizes(), y.options());
    if (ctx->needs_input_grad(1)) gm = at::zeros(m.sizes(), m.options());
    if (gated && ctx->needs_input_grad(2)) gup = at::empty(y.sizes(), y.options());
    for_wide_rows(y, [&](int64_t begin, int64_t count) {
      auto wide = [&](const torch::Tensor& t) { return t.narrow(0, begin, count).to(m.scalar_type()); };
      const torch::Tensor g = wide(grads[0]), own = rows_of(m, y, begin, count), part = wide(y);
      const torch::Tensor of_scaled = gated ? g * wide(saved[2]) : g;
      if (gy.defined()) gy.narrow(0, begin, count).copy_(of_scaled * own);
      if (gup.defined()) gup.narrow(0, begin, count).copy_(g * part * own);
      if (gm.defined()) rows_of(gm, y, begin, count).add_(at::sum_to(of_scaled * part, own.sizes()));
    });
    return {gy, gm, gup, torch::Tensor()};
  }

 private:
  static torch::Tensor rows_of(const torch::Tensor& m, const torch::Tensor& y, int64_t begin, int64_t count) {
    return m.dim() == y.dim() ? m.narrow(0, begin, count) : m;
  }
};

}  // namespace

ScaleExperts::ScaleExperts(torch::Tensor v, Router r, double effect)
    : vectors(std::move(v)), router(std::move(r)), effect_(effect) {}

namespace {

bool are_alike() { return nn::AlikeRows::now() != nn::AlikeRows::Number::kAny; }

/// weights v: [N, E] x [E, f].
torch::Tensor mixed_vectors(const torch::Tensor& weights, const torch::Tensor& v) {
  if (!are_alike()) return at::mm(weights, v);
  torch::Tensor m = torch::zeros({weights.size(0), v.size(1)}, v.options().requires_grad(false));
  nn::thin_add(weights, v, 1.0, m);
  return m;
}

}  // namespace

torch::Tensor ScaleExperts::merge(const torch::Tensor& weights) const {
  // Residual top-k: 1 + sum w (v - 1), so that a small kept mass does not shrink the activation.
  const bool residual = router.options.top_k > 0 && router.options.topk_mode == TopkMode::kResidual;
  const torch::Tensor v = residual ? vectors - 1 : vectors;
  torch::Tensor m;
  if (vectors.dim() == 2) {
    m = mixed_vectors(weights, v);
  } else if (weights.dim() == 2) {
    m = mixed_vectors(weights, v.flatten(1)).view({-1, v.size(1), v.size(2)});
  } else if (are_alike()) {
    std::vector<torch::Tensor> heads;
    for (int64_t h = 0; h < v.size(1); ++h) heads.push_back(mixed_vectors(weights.select(1, h), v.select(1, h)));
    m = torch::stack(heads, 1);
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
         !are_alike() && pass.routing == nullptr && !(pass.mixture.defined() && column >= 0) &&
         (input.scalar_type() == vectors.scalar_type() || input.scalar_type() == torch::kBFloat16);
}

bool ScaleExperts::unused(const nn::Pass& pass) const {
  if (!pass.mixture.defined() || column < 0 || pass.routing != nullptr || !pass.mixture.is_cpu()) return false;
  const std::vector<nn::MixtureRun> runs = pass.mixture_runs();
  return std::all_of(runs.begin(), runs.end(), [&](const nn::MixtureRun& run) { return run.weights[column] == 0; });
}

int64_t ScaleExperts::saved_per_row() const { return vectors.size(0) * (vectors.dim() == 3 ? vectors.size(1) : 1); }

torch::Tensor ScaleExperts::forward(const torch::Tensor& y, nn::Pass& pass) {
  if (unused(pass)) return y;
  if (y.dim() == 3 && vectors.dim() == 2) return forward(y.flatten(1), pass).view(y.sizes());
  if (y.dim() == 3 && fused(y, pass)) return MovHeads::apply(y, router.weight, vectors);
  return ScaledRows::apply(y, merged(y, pass), y, /*gated=*/false);
}

torch::Tensor ScaleExperts::forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass& pass) {
  if (unused(pass)) return act * up;
  if (fused(act, pass)) return MovFfn::apply(act, up, router.weight, vectors);
  const bool product = router.defined() && router.options.input == RouterInput::kFfnProduct;
  return ScaledRows::apply(act, merged(product ? act * up : act, pass), up, /*gated=*/true);
}

}  // namespace moesaic::moe
