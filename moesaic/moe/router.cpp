#include "moesaic/moe/router.h"

#include "moesaic/base/check.h"
#include "moesaic/moe/wide_rows.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::moe {
namespace {

/// fp32(u) W^T of a half-precision u [..., d]. Saves u as it is: no wide copy of it.
struct WideLinear : torch::autograd::Function<WideLinear> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& u,
                               const torch::Tensor& weight) {
    std::vector<int64_t> shape = u.sizes().vec();
    shape.back() = weight.size(0);
    torch::Tensor out = at::empty(shape, weight.options().requires_grad(false));
    for_wide_rows(u, [&](int64_t begin, int64_t count) {
      out.narrow(0, begin, count).copy_(at::linear(wide_rows(u, begin, count), weight));
    });
    ctx->save_for_backward({u, weight});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &u = saved[0], &weight = saved[1];
    torch::Tensor gu = ctx->needs_input_grad(0) ? at::empty(u.sizes(), u.options()) : torch::Tensor();
    torch::Tensor gweight = at::zeros_like(weight);
    for_wide_rows(u, [&](int64_t begin, int64_t count) {
      const torch::Tensor g = grads[0].narrow(0, begin, count);
      gweight.addmm_(g.reshape({-1, g.size(-1)}).t(), wide_rows(u, begin, count).reshape({-1, u.size(-1)}));
      if (gu.defined()) gu.narrow(0, begin, count).copy_(at::matmul(g, weight));
    });
    return {gu, gweight};
  }
};

}  // namespace

torch::Tensor top_experts(const torch::Tensor& probs, int64_t k) {
  return std::get<1>(probs.detach().sort(/*stable=*/true, -1, /*descending=*/true)).narrow(-1, 0, k);
}

torch::Tensor topk_weights(const torch::Tensor& probs, int64_t k, TopkMode mode) {
  if (k == 0 || k >= probs.size(-1)) return probs;
  const torch::Tensor kept = top_experts(probs, k);
  const torch::Tensor mask = torch::zeros_like(probs).scatter_(-1, kept, 1.0);
  const torch::Tensor masked = probs * mask;
  return mode == TopkMode::kRenorm ? masked / masked.sum(-1, /*keepdim=*/true) : masked;
}

torch::Tensor Router::logits(const torch::Tensor& u, const nn::Pass& pass) const {
  torch::Tensor product;
  if (options.jitter > 0 && pass.training) {
    const torch::Tensor input = u.to(weight.scalar_type());
    product = at::linear(
        input * torch::empty_like(input).uniform_(1.0 - options.jitter, 1.0 + options.jitter, pass.generator), weight);
  } else {
    const bool alike = nn::AlikeRows::now() != nn::AlikeRows::Number::kAny && !torch::GradMode::is_enabled();
    std::vector<int64_t> shape = u.sizes().vec();
    shape.back() = weight.size(0);
    const torch::Tensor wide = u.element_size() == 2 && !alike ? u : u.to(weight.scalar_type());
    product = alike                   ? nn::thin_dots(wide.reshape({-1, u.size(-1)}), weight).view(shape)
              : u.element_size() == 2 ? WideLinear::apply(u, weight)
                                      : at::linear(wide, weight);
  }
  if (options.absolute) product = product.abs();
  return options.temperature == 1.0 ? product : product / options.temperature;
}

torch::Tensor Router::route(const torch::Tensor& logits, nn::Pass& pass, int64_t rows_per_token) const {
  const torch::Tensor probs = logits.softmax(-1);
  const torch::Tensor weights = topk_weights(probs, options.top_k, options.topk_mode);
  MOESAIC_ASSERT(weights.sizes() == probs.sizes() && !(weights.detach().min().item<double>() < 0));
  if (pass.routing != nullptr) {
    pass.routing->push_back({owner, site, layer, weight.requires_grad(), logits, probs, weights, rows_per_token});
  }
  return weights;
}

Choice Router::choose(const torch::Tensor& logits, nn::Pass& pass) const {
  const torch::Tensor probs = logits.softmax(-1);
  Choice choice{top_experts(probs, options.top_k), {}};
  choice.weights = probs.gather(-1, choice.experts);
  if (options.topk_mode == TopkMode::kRenorm) choice.weights = choice.weights / choice.weights.sum(-1, true);
  if (pass.routing != nullptr) {
    pass.routing->push_back({owner, site, layer, weight.requires_grad(), logits, probs,
                             torch::zeros_like(probs).scatter(-1, choice.experts, choice.weights), 1});
  }
  return choice;
}

torch::Tensor Router::route_from_pass(nn::Pass& pass) const {
  if (options.input == RouterInput::kLayerInput) return route(logits(pass.layer_input, pass), pass, 1);
  MOESAIC_CHECK(pass.sentence.defined(), UsageError,
                "router of {}: got no sentence vectors, expected [{}, {}]: the router's input is `sentence`", site,
                pass.offsets.size() - 1, weight.size(1));
  MOESAIC_CHECK(pass.sentence.size(1) == weight.size(1), ShapeError,
                "router of {}: got sentence vectors of width {}, expected {}", site, pass.sentence.size(1),
                weight.size(1));
  return route(logits(pass.sentence, pass), pass, 0).index_select(0, pass.segments);
}

torch::Tensor balance_loss(const nn::RoutingRecord& record) {
  const int64_t experts = record.probs.size(-1);
  const torch::Tensor probs = record.probs.reshape({-1, experts});
  const torch::Tensor weights = record.weights.detach().reshape({-1, experts});
  torch::Tensor slots = (weights > 0).to(probs.scalar_type());
  if (slots.sum(-1).min().item<double>() == experts) {
    slots = torch::zeros_like(probs).scatter_(-1, probs.detach().argmax(-1, /*keepdim=*/true), 1.0);
  }
  const torch::Tensor fraction = slots.sum(0) / slots.sum();
  return experts * (fraction * probs.mean(0)).sum();
}

torch::Tensor z_loss(const nn::RoutingRecord& record) { return record.logits.logsumexp(-1).square().mean(); }

TopkMode parse_topk_mode(const std::string& name) {
  if (name == "mask") return TopkMode::kMask;
  if (name == "renorm") return TopkMode::kRenorm;
  if (name == "residual") return TopkMode::kResidual;
  throw UsageError(fmt::format("router.topk_mode: got '{}', expected mask, renorm or residual", name));
}

RouterInput parse_router_input(const std::string& name) {
  if (name == "token") return RouterInput::kToken;
  if (name == "sentence") return RouterInput::kSentence;
  if (name == "layer_input") return RouterInput::kLayerInput;
  if (name == "ffn_product") return RouterInput::kFfnProduct;
  throw UsageError(fmt::format("router.input: got '{}', expected token, sentence, layer_input or ffn_product", name));
}

}  // namespace moesaic::moe
