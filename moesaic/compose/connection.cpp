#include "moesaic/compose/connection.h"

#include "moesaic/nn/attention.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/rope.h"

namespace moesaic::compose {
namespace {

nn::Linear make_linear(int64_t in, int64_t out, bool bias, const torch::TensorOptions& options) {
  nn::Linear linear(torch::empty({out, in}, options), bias ? torch::empty({out}, options) : torch::Tensor());
  for (torch::Tensor& parameter : linear->parameters()) parameter.set_requires_grad(true);
  return linear;
}

torch::Tensor project(const nn::Linear& linear, const torch::Tensor& x) {
  return nn::linear_rows(x, linear->weight, linear->bias);
}

std::vector<int64_t> lengths(const std::vector<int64_t>& offsets) {
  std::vector<int64_t> result(offsets.size() - 1);
  for (size_t b = 0; b < result.size(); ++b) result[b] = offsets[b + 1] - offsets[b];
  return result;
}

/// True when both sides have the same rows and c(t) = t + 1: ordinary causal attention.
bool is_causal_square(const KeysValues& keys_values, const Visibility& seen) {
  if (keys_values.offsets != seen.query_offsets) return false;
  for (size_t b = 0; b + 1 < seen.query_offsets.size(); ++b) {
    for (int64_t n = seen.query_offsets[b]; n < seen.query_offsets[b + 1]; ++n) {
      if (seen.visible[n] != n - seen.query_offsets[b] + 1) return false;
    }
  }
  return true;
}

/// Keys and values of each sequence, [S, H, k].
std::vector<std::pair<torch::Tensor, torch::Tensor>> by_sequence(const KeysValues& keys_values) {
  if (!keys_values.cached.empty()) return keys_values.cached;
  const auto k = keys_values.k.split_with_sizes(lengths(keys_values.offsets));
  const auto v = keys_values.v.split_with_sizes(lengths(keys_values.offsets));
  std::vector<std::pair<torch::Tensor, torch::Tensor>> sequences;
  for (size_t b = 0; b < k.size(); ++b) sequences.emplace_back(k[b], v[b]);
  return sequences;
}

/// One sequence's queries [T, H, k], of which each sees at least one key [S, H, k].
torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                     std::span<const int64_t> visible) {
  auto heads_first = [](const torch::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };  // [1, H, T, k]
  std::optional<torch::Tensor> mask;
  const int64_t keys = k.size(0);
  if (visible.front() < keys) {  // counts do not decrease
    const torch::Tensor counts = torch::tensor(c10::IntArrayRef(visible.data(), visible.size()), torch::kInt64);
    mask = (torch::arange(keys, torch::kInt64).unsqueeze(0) < counts.unsqueeze(1)).to(q.device());
  }
  return at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), mask)
      .squeeze(0)
      .transpose(0, 1);
}

}  // namespace

torch::Tensor prefix_attention(const torch::Tensor& q, const KeysValues& keys_values, const Visibility& seen) {
  if (keys_values.cached.empty() && is_causal_square(keys_values, seen)) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
    return nn::ragged_attention(q, keys_values.k, keys_values.v, seen.query_offsets, {.scale = scale});
  }
  const std::vector<int64_t> rows = lengths(seen.query_offsets);
  const std::vector<torch::Tensor> queries = q.split_with_sizes(rows);
  const auto sequences = by_sequence(keys_values);
  std::vector<torch::Tensor> parts;
  for (size_t b = 0; b < rows.size(); ++b) {
    const std::span<const int64_t> visible(seen.visible.data() + seen.query_offsets[b], static_cast<size_t>(rows[b]));
    const int64_t blind = std::upper_bound(visible.begin(), visible.end(), 0) - visible.begin();
    if (blind > 0) parts.push_back(torch::zeros({blind, q.size(1), q.size(2)}, q.options().requires_grad(false)));
    if (blind == rows[b]) continue;
    // What no query sees takes no part, so that its presence cannot change a result.
    const auto& [k, v] = sequences[b];
    parts.push_back(attend(queries[b].slice(0, blind), k.slice(0, 0, visible.back()), v.slice(0, 0, visible.back()),
                           visible.subspan(static_cast<size_t>(blind))));
  }
  return at::cat(parts);
}

ConnectionImpl::ConnectionImpl(const ConnectionConfig& config, int64_t augmenting_width, int64_t anchor_width,
                               const torch::TensorOptions& options)
    : config_(config), heads_(config.num_heads), head_dim_(anchor_width / config.num_heads) {
  proj_ = register_module("proj", make_linear(augmenting_width, anchor_width, /*bias=*/true, options));
  auto square = [&](const char* name) {
    return register_module(name, make_linear(anchor_width, anchor_width, config.attention_bias, options));
  };
  q_proj_ = square("q_proj");
  k_proj_ = square("k_proj");
  v_proj_ = square("v_proj");
  o_proj_ = square("o_proj");
  if (config.norm == "post") {
    norm_ = register_module("norm", nn::RmsNorm(anchor_width, config.norm_eps, /*offset=*/1.0, options));
    norm_->weight.set_requires_grad(true);
  }
}

void ConnectionImpl::initialize(at::Generator generator) {
  torch::NoGradGuard no_grad;
  for (nn::Linear* linear : {&proj_, &q_proj_, &k_proj_, &v_proj_, &o_proj_}) {
    torch::Tensor& weight = (*linear)->weight;
    const double deviation = 1.0 / std::sqrt(static_cast<double>(weight.size(1)));
    weight.copy_(torch::empty(weight.sizes(), torch::kFloat32).normal_(0.0, deviation, generator));
    if ((*linear)->bias.defined()) (*linear)->bias.zero_();
  }
  if (config_.output_init == "zero") o_proj_->weight.zero_();
  if (!norm_.is_empty()) norm_->weight.zero_();
}

/// What a projection reads: float32, with norm `pre` scaled to a root mean square of one.
torch::Tensor ConnectionImpl::input(const torch::Tensor& x) const {
  const torch::Tensor wide = x.to(proj_->weight.dtype());
  if (config_.norm != "pre") return wide;
  return wide * (wide.square().mean(-1, /*keepdim=*/true) + config_.norm_eps).rsqrt();
}

std::pair<torch::Tensor, torch::Tensor> ConnectionImpl::keys_values(const torch::Tensor& states,
                                                                    const nn::RotaryTables& rope) {
  const torch::Tensor p = project(proj_, input(states));
  torch::Tensor k = project(k_proj_, p).view({-1, heads_, head_dim_});
  if (config_.cross_position == "rope") k = nn::apply_rope(k, rope);
  return {k, project(v_proj_, p).view({-1, heads_, head_dim_})};
}

torch::Tensor ConnectionImpl::queries(const torch::Tensor& h, const nn::RotaryTables& rope) {
  const torch::Tensor q = project(q_proj_, input(h)).view({h.size(0), heads_, head_dim_});
  return config_.cross_position == "rope" ? nn::apply_rope(q, rope) : q;
}

std::vector<torch::Tensor> ConnectionImpl::attention_weights(const torch::Tensor& h, const nn::RotaryTables& rope,
                                                             const KeysValues& keys_values, const Visibility& seen) {
  torch::NoGradGuard no_grad;
  const auto sequences = by_sequence(keys_values);
  const torch::Tensor counts = torch::tensor(seen.visible, torch::kInt64).to(h.device()).unsqueeze(1);  // [N, 1]
  const torch::Tensor q = queries(h, rope);
  std::vector<torch::Tensor> weights;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const int64_t begin = seen.query_offsets[b], end = seen.query_offsets[b + 1];
    const torch::Tensor& k = sequences[b].first;
    if (!k.defined() || k.size(0) == 0) {
      weights.push_back(torch::zeros({heads_, end - begin, 0}, q.options()));
      continue;
    }
    const torch::Tensor hidden = torch::arange(k.size(0), counts.options()) >= counts.slice(0, begin, end);  // [T, S]
    const torch::Tensor scores = at::matmul(q.slice(0, begin, end).transpose(0, 1), k.permute({1, 2, 0})) /
                                 std::sqrt(static_cast<double>(head_dim_));
    weights.push_back(scores.masked_fill(hidden, -INFINITY).softmax(-1).masked_fill(hidden, 0.0));
  }
  return weights;
}

torch::Tensor ConnectionImpl::forward(const torch::Tensor& h, const nn::RotaryTables& rope,
                                      const KeysValues& keys_values, const Visibility& seen) {
  const torch::Tensor mixed = prefix_attention(queries(h, rope), keys_values, seen);
  torch::Tensor y = project(o_proj_, mixed.reshape({h.size(0), heads_ * head_dim_}));
  if (!norm_.is_empty()) y = norm_->forward(y);
  if (std::find(seen.visible.begin(), seen.visible.end(), 0) != seen.visible.end()) {
    const torch::Tensor counts = torch::tensor(seen.visible, torch::kInt64).to(y.device());
    y = y.masked_fill((counts == 0).unsqueeze(1), 0.0);
  }
  return y.to(h.dtype());
}

}  // namespace moesaic::compose
