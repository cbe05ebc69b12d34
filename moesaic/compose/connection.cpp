#include "moesaic/compose/connection.h"

#include "moesaic/nn/attention.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/rope.h"

namespace moesaic::compose {
namespace {

constexpr double kSteepest = 3.0;  // slopes start at 8, 4, 2, 1, 1/2, ... per place

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

/// How many keys each query sees.
std::vector<int64_t> counts_of(const Visibility& seen) {
  std::vector<int64_t> counts = seen.visible;
  for (size_t n = 0; n < seen.aside.size(); ++n) counts[n] += seen.aside[n].second - seen.aside[n].first;
  return counts;
}

/// The last key that query n sees; -1 = none.
int64_t newest(const Visibility& seen, int64_t n) {
  const bool aside = !seen.aside.empty() && seen.aside[n].first < seen.aside[n].second;
  return (aside ? seen.aside[n].second : seen.visible[n]) - 1;
}

/// True when both sides have the same rows and c(t) = t + 1: ordinary causal attention.
bool is_causal_square(const KeysValues& keys_values, const Visibility& seen) {
  if (keys_values.offsets != seen.query_offsets || !seen.aside.empty()) return false;
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

/// What is added to the scores of rows begin .. end-1 of sequence b and its first `keys` keys, [H or 1, T, S]: minus
/// infinity where a key is not seen. Undefined where nothing is.
torch::Tensor score_bias(const Visibility& seen, size_t b, int64_t begin, int64_t end, int64_t keys,
                         const torch::Tensor& slopes, const torch::TensorOptions& options) {
  auto column = [](std::span<const int64_t> numbers) {
    return torch::tensor(c10::IntArrayRef(numbers.data(), numbers.size()), torch::kInt64).unsqueeze(1);
  };
  auto rows = [&](const std::vector<int64_t>& numbers) {
    return column(std::span(numbers).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)));
  };
  torch::Tensor bias;
  if (slopes.defined()) {
    const auto places = column(std::span(seen.key_places.at(b)).first(static_cast<size_t>(keys))).squeeze(1);
    const torch::Tensor apart = (rows(seen.query_places) - places).abs().to(options);
    bias = apart * -slopes.view({-1, 1, 1});
  }
  if (seen.visible[begin] == keys) return bias;  // counts do not decrease
  const torch::Tensor places = torch::arange(keys, torch::kInt64);
  torch::Tensor hidden = places >= rows(seen.visible);
  if (!seen.aside.empty()) {
    std::vector<int64_t> first, last;
    for (int64_t n = begin; n < end; ++n) {
      first.push_back(seen.aside[n].first);
      last.push_back(seen.aside[n].second);
    }
    hidden = hidden.logical_and((places < column(first)).logical_or(places >= column(last)));
  }
  if (!bias.defined()) bias = torch::zeros({1, 1, 1}, options);
  return bias.masked_fill(hidden.to(options.device()), -INFINITY);
}

/// One sequence's queries [T, H, k], of which each sees at least one key [S, H, k].
torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                     const torch::Tensor& bias) {
  auto heads_first = [](const torch::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };  // [1, H, T, k]
  const auto mask = bias.defined() ? std::optional(bias.unsqueeze(0)) : std::nullopt;
  return at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), mask)
      .squeeze(0)
      .transpose(0, 1);
}

/// The newest value that each row sees, [N, H, k]; of a row that sees none any.
torch::Tensor newest_of(const KeysValues& keys_values, const Visibility& seen) {
  const auto sequences = by_sequence(keys_values);
  std::vector<torch::Tensor> parts;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const torch::Tensor& v = sequences[b].second;
    std::vector<int64_t> chosen;
    for (int64_t n = seen.query_offsets[b]; n < seen.query_offsets[b + 1]; ++n) {
      chosen.push_back(std::max<int64_t>(newest(seen, n), 0));
    }
    if (!v.defined() || v.size(0) == 0) {
      const torch::Tensor& any = keys_values.v;
      parts.push_back(torch::zeros({std::ssize(chosen), any.size(1), any.size(2)}, any.options()));
    } else {
      parts.push_back(v.index_select(0, torch::tensor(chosen, torch::kInt64).to(v.device())));
    }
  }
  return at::cat(parts);
}

/// One where newest_of looks, per sequence [H, T, S].
std::vector<torch::Tensor> newest_weights(const std::vector<std::pair<torch::Tensor, torch::Tensor>>& sequences,
                                          const Visibility& seen, int64_t heads, torch::Device device) {
  std::vector<torch::Tensor> weights;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const int64_t begin = seen.query_offsets[b], rows = seen.query_offsets[b + 1] - begin;
    const int64_t keys = sequences[b].first.defined() ? sequences[b].first.size(0) : 0;
    torch::Tensor chosen = torch::zeros({rows, keys}, torch::kFloat32);
    for (int64_t n = 0; n < rows; ++n) {
      if (newest(seen, begin + n) >= 0) chosen[n][newest(seen, begin + n)] = 1.0;
    }
    weights.push_back(chosen.to(device).expand({heads, rows, keys}));
  }
  return weights;
}

}  // namespace

torch::Tensor prefix_attention(const torch::Tensor& q, const KeysValues& keys_values, const Visibility& seen,
                               const torch::Tensor& slopes) {
  if (!slopes.defined() && keys_values.cached.empty() && is_causal_square(keys_values, seen)) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
    return nn::ragged_attention(q, keys_values.k, keys_values.v, seen.query_offsets, {.scale = scale});
  }
  const std::vector<int64_t> rows = lengths(seen.query_offsets);
  const std::vector<torch::Tensor> queries = q.split_with_sizes(rows);
  const auto sequences = by_sequence(keys_values);
  std::vector<torch::Tensor> parts;
  for (size_t b = 0; b < rows.size(); ++b) {
    int64_t keys = 0;  // behind the last one that any query sees
    int64_t blind = 0;
    for (int64_t n = seen.query_offsets[b]; n < seen.query_offsets[b + 1]; ++n) {
      blind += newest(seen, n) < 0 ? 1 : 0;
      keys = std::max(keys, newest(seen, n) + 1);
    }
    if (blind > 0) parts.push_back(torch::zeros({blind, q.size(1), q.size(2)}, q.options().requires_grad(false)));
    if (blind == rows[b]) continue;
    // What no query sees takes no part, so that its presence cannot change a result.
    const auto& [k, v] = sequences[b];
    const int64_t begin = seen.query_offsets[b] + blind, end = seen.query_offsets[b + 1];
    parts.push_back(attend(queries[b].slice(0, blind), k.slice(0, 0, keys), v.slice(0, 0, keys),
                           score_bias(seen, b, begin, end, keys, slopes, q.options().requires_grad(false))));
  }
  return at::cat(parts);
}

ConnectionImpl::ConnectionImpl(const ConnectionConfig& config, bool newest, int64_t augmenting_width,
                               int64_t anchor_width, const torch::TensorOptions& options)
    : config_(config), newest_(newest), heads_(config.num_heads), head_dim_(anchor_width / config.num_heads) {
  proj_ = register_module("proj", make_linear(augmenting_width, anchor_width, /*bias=*/true, options));
  if (!newest) {
    auto square = [&](const char* name) {
      return register_module(name, make_linear(anchor_width, anchor_width, config.attention_bias, options));
    };
    q_proj_ = square("q_proj");
    k_proj_ = square("k_proj");
    v_proj_ = square("v_proj");
    o_proj_ = square("o_proj");
    if (config.cross_position == "recency") slopes_ = register_parameter("slopes", torch::empty({heads_}, options));
  }
  if (config.norm == "post") {
    norm_ = register_module("norm", nn::RmsNorm(anchor_width, config.norm_eps, /*offset=*/1.0, options));
    norm_->weight.set_requires_grad(true);
  }
  if (config.norm == "standard") {
    mean_ = register_buffer("input_mean", torch::zeros({augmenting_width}, options));
    deviation_ = register_buffer("input_deviation", torch::ones({augmenting_width}, options));
  }
}

void ConnectionImpl::initialize(at::Generator generator) {
  torch::NoGradGuard no_grad;
  for (nn::Linear* linear : {&proj_, &q_proj_, &k_proj_, &v_proj_, &o_proj_}) {
    if (linear->is_empty()) continue;
    torch::Tensor& weight = (*linear)->weight;
    const double deviation = 1.0 / std::sqrt(static_cast<double>(weight.size(1)));
    weight.copy_(torch::empty(weight.sizes(), torch::kFloat32).normal_(0.0, deviation, generator));
    if ((*linear)->bias.defined()) (*linear)->bias.zero_();
  }
  if (config_.output_init == "zero") (newest_ ? proj_ : o_proj_)->weight.zero_();
  if (!norm_.is_empty()) norm_->weight.zero_();
  if (slopes_.defined()) slopes_.copy_(at::exp2(kSteepest - torch::arange(heads_, torch::kFloat32)));
}

/// float32, with norms that say so divided by each row's root mean square.
torch::Tensor ConnectionImpl::unit_rows(const torch::Tensor& x) const {
  const torch::Tensor wide = x.to(proj_->weight.dtype());
  if (config_.norm != "pre" && config_.norm != "standard") return wide;
  return wide * (wide.square().mean(-1, /*keepdim=*/true) + config_.norm_eps).rsqrt();
}

torch::Tensor ConnectionImpl::augmenting_input(const torch::Tensor& states) {
  if (config_.norm != "standard") return unit_rows(states);
  const torch::Tensor wide = states.to(proj_->weight.dtype());
  torch::NoGradGuard no_grad;
  const bool unknown = at::all(mean_ == 0).item<bool>() && at::all(deviation_ == 1).item<bool>();
  if (unknown && is_training() && wide.size(0) > 1) {
    mean_.copy_(wide.mean(0));
    deviation_.copy_(wide.std(0).clamp_min(std::sqrt(config_.norm_eps)));
  }
  return (wide - mean_) / deviation_;
}

std::pair<torch::Tensor, torch::Tensor> ConnectionImpl::keys_values(const torch::Tensor& states,
                                                                    const nn::RotaryTables& rope) {
  const torch::Tensor p = project(proj_, augmenting_input(states));
  if (newest_) return {p.view({-1, heads_, head_dim_}), p.view({-1, heads_, head_dim_})};
  torch::Tensor k = project(k_proj_, p).view({-1, heads_, head_dim_});
  if (config_.cross_position == "rope") k = nn::apply_rope(k, rope);
  return {k, project(v_proj_, p).view({-1, heads_, head_dim_})};
}

torch::Tensor ConnectionImpl::queries(const torch::Tensor& h, const nn::RotaryTables& rope) {
  const torch::Tensor q = project(q_proj_, unit_rows(h)).view({h.size(0), heads_, head_dim_});
  return config_.cross_position == "rope" ? nn::apply_rope(q, rope) : q;
}

std::vector<torch::Tensor> ConnectionImpl::attention_weights(const torch::Tensor& h, const nn::RotaryTables& rope,
                                                             const KeysValues& keys_values, const Visibility& seen) {
  torch::NoGradGuard no_grad;
  const auto sequences = by_sequence(keys_values);
  if (newest_) return newest_weights(sequences, seen, heads_, h.device());
  const torch::Tensor q = queries(h, rope);
  std::vector<torch::Tensor> weights;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const int64_t begin = seen.query_offsets[b], end = seen.query_offsets[b + 1];
    const torch::Tensor& k = sequences[b].first;
    const int64_t keys = k.defined() ? k.size(0) : 0;
    if (keys == 0 || begin == end) {
      weights.push_back(torch::zeros({heads_, end - begin, keys}, q.options()));
      continue;
    }
    torch::Tensor scores = at::matmul(q.slice(0, begin, end).transpose(0, 1), k.permute({1, 2, 0})) /
                           std::sqrt(static_cast<double>(head_dim_));
    const torch::Tensor bias = score_bias(seen, b, begin, end, keys, slopes_, q.options());
    if (bias.defined()) scores = scores + bias;
    weights.push_back(scores.softmax(-1).nan_to_num(0.0));  // of a row that sees nothing
  }
  return weights;
}

torch::Tensor ConnectionImpl::forward(const torch::Tensor& h, const nn::RotaryTables& rope,
                                      const KeysValues& keys_values, const Visibility& seen) {
  const torch::Tensor mixed =
      newest_ ? newest_of(keys_values, seen) : prefix_attention(queries(h, rope), keys_values, seen, slopes_);
  torch::Tensor y = mixed.reshape({h.size(0), heads_ * head_dim_});
  if (!newest_) y = project(o_proj_, y);
  if (!norm_.is_empty()) y = norm_->forward(y);
  if (config_.output_scale > 0) {
    y = y * (config_.output_scale * h.to(y.dtype()).square().mean(-1, /*keepdim=*/true).sqrt());
  }
  if (std::find(seen.visible.begin(), seen.visible.end(), 0) != seen.visible.end()) {
    const torch::Tensor counts = torch::tensor(counts_of(seen), torch::kInt64).to(y.device());
    y = y.masked_fill((counts == 0).unsqueeze(1), 0.0);
  }
  return y.to(h.dtype());
}

}  // namespace moesaic::compose
