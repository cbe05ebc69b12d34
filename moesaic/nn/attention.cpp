#include "moesaic/nn/attention.h"

#include <ATen/Parallel.h>

#include "moesaic/base/check.h"
#include "moesaic/nn/kernel_table.h"
#include "moesaic/nn/kv_cache.h"
#include "moesaic/nn/rope.h"
#include "moesaic/nn/split.h"

namespace moesaic::nn {
namespace {

/// 0 where a query sees a key, -inf elsewhere: [S, T]; the S queries are the last of T positions.
torch::Tensor visibility_mask(int64_t queries, int64_t keys, int64_t window, const torch::TensorOptions& options) {
  const auto integers = options.dtype(torch::kInt64);
  const torch::Tensor position = torch::arange(keys - queries, keys, integers).unsqueeze(1);
  const torch::Tensor key = torch::arange(keys, integers);
  torch::Tensor hidden = key > position;
  if (window > 0) hidden = hidden.logical_or(key <= position - window);
  return torch::zeros({queries, keys}, options).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

/// What a fused attention call needs to know about visibility: a mask, or a flag, or (one query) nothing.
struct Visibility {
  bool causal = false;
  std::optional<torch::Tensor> mask;
};
Visibility visibility(int64_t queries, int64_t keys, int64_t window, const torch::TensorOptions& options) {
  const bool windowed = window > 0 && keys > window;
  if (windowed || (queries > 1 && queries < keys)) return {false, visibility_mask(queries, keys, window, options)};
  return {queries > 1, std::nullopt};
}

/// q rows [S, H, k] as [H_kv, g, S, k], g query heads per KV head.
torch::Tensor grouped_queries(const torch::Tensor& q, int64_t kv_heads) {
  return q.view({q.size(0), kv_heads, q.size(1) / kv_heads, q.size(2)}).permute({1, 2, 0, 3});
}
/// Keys or values [T, H_kv, k] as [H_kv, g, T, k], not copied.
torch::Tensor shared_heads(const torch::Tensor& x, int64_t group) {
  return x.permute({1, 0, 2}).unsqueeze(1).expand({x.size(1), group, x.size(0), x.size(2)});
}

/// One sequence by the formula; differentiable; the scores are [H, S, T].
torch::Tensor plain_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                              const AttentionOptions& options) {
  const int64_t kv_heads = k.size(1), group = q.size(1) / kv_heads;
  torch::Tensor scores =
      at::matmul(grouped_queries(q, kv_heads), shared_heads(k, group).transpose(2, 3)) * options.scale;
  if (options.softcap > 0) scores = at::tanh(scores / options.softcap) * options.softcap;
  scores = scores + visibility_mask(q.size(0), k.size(0), options.window, scores.options().requires_grad(false));
  const auto wide = q.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const torch::Tensor weights = at::softmax(scores, -1, wide).to(q.dtype());
  return at::matmul(weights, shared_heads(v, group)).permute({2, 0, 1, 3}).reshape(q.sizes());
}

/// One sequence by LibTorch's fused kernels; differentiable.
torch::Tensor fused_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                              const AttentionOptions& options) {
  const auto seen = visibility(q.size(0), k.size(0), options.window, q.options().requires_grad(false));
  auto heads_first = [](const torch::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };  // [1, H, S, k]
  return at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), seen.mask, 0.0, seen.causal,
                                          options.scale, /*enable_gqa=*/true)
      .squeeze(0)
      .transpose(0, 1)
      .contiguous();
}

/// The whole ragged batch on the CPU, sequence by sequence, by LibTorch's flash attention. K and V are shared by the
/// query heads of a group as a stride-0 axis.
struct CpuFlashFunction : torch::autograd::Function<CpuFlashFunction> {
  struct Result {
    torch::Tensor out;                // [N, H, k]
    std::vector<torch::Tensor> sums;  // logsumexp of each sequence
  };

  static Result run(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                    const std::vector<int64_t>& offsets, double scale, int64_t window) {
    const int64_t kv_heads = k.size(1), group = q.size(1) / kv_heads;
    Result result{at::empty(q.sizes(), q.options().requires_grad(false)), {}};
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
      const int64_t length = offsets[b + 1] - offsets[b];
      const auto seen = visibility(length, length, window, result.out.options());
      auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
          grouped_queries(rows(q), kv_heads), shared_heads(rows(k), group), shared_heads(rows(v), group), 0.0,
          seen.causal, seen.mask, scale);
      grouped_queries(rows(result.out), kv_heads).copy_(out);
      result.sums.push_back(sums);
    }
    return result;
  }

  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& queries,
                               const torch::Tensor& keys, const torch::Tensor& values,
                               const std::vector<int64_t>& offsets, double scale, int64_t window) {
    // Contiguous copies, so that the fused projection they are cut from can be freed.
    const torch::Tensor q = queries.contiguous(), k = keys.contiguous(), v = values.contiguous();
    Result result = run(q, k, v, offsets, scale, window);
    torch::autograd::variable_list saved{q, k, v, result.out};
    saved.insert(saved.end(), result.sums.begin(), result.sums.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["offsets"] = offsets;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    return result.out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3];
    const std::vector<int64_t> offsets = ctx->saved_data["offsets"].toIntVector();
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t window = ctx->saved_data["window"].toInt();
    const int64_t kv_heads = k.size(1), group = q.size(1) / kv_heads;
    const torch::Tensor d_out = grads[0].contiguous();
    torch::Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
      const int64_t length = offsets[b + 1] - offsets[b];
      const auto seen = visibility(length, length, window, d_out.options());
      auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grouped_queries(rows(d_out), kv_heads), grouped_queries(rows(q), kv_heads), shared_heads(rows(k), group),
          shared_heads(rows(v), group), grouped_queries(rows(out), kv_heads), saved[4 + b], 0.0, seen.causal, seen.mask,
          scale);
      grouped_queries(rows(dq), kv_heads).copy_(gq);
      rows(dk).transpose(0, 1).copy_(group == 1 ? gk.squeeze(1) : gk.sum(1));  // [H_kv, S, k]
      rows(dv).transpose(0, 1).copy_(group == 1 ? gv.squeeze(1) : gv.sum(1));
    }
    return {dq, dk, dv, {}, {}, {}};
  }
};

/// The whole ragged batch on a GPU in half precision; differentiable.
torch::Tensor cuda_flash_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                   const std::vector<int64_t>& offsets, const AttentionOptions& options) {
  const torch::Tensor bounds = torch::tensor(offsets, torch::kInt32).to(q.device());
  int64_t longest = 0;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) longest = std::max(longest, offsets[b + 1] - offsets[b]);
  const bool windowed = options.window > 0 && longest > options.window;
  const std::optional<int64_t> left = windowed ? std::optional<int64_t>(options.window - 1) : std::nullopt;
  const std::optional<int64_t> right = windowed ? std::optional<int64_t>(0) : std::nullopt;
  return std::get<0>(at::_flash_attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds,
                                                  longest, longest, 0.0, /*is_causal=*/true, false, options.scale, left,
                                                  right));
}

/// One new position per sequence, float32 on the CPU: a task per sequence and KV head.
torch::Tensor decode_attention(const torch::Tensor& q,
                               const std::vector<std::pair<torch::Tensor, torch::Tensor>>& cached,
                               const AttentionOptions& options) {
  const int64_t heads = q.size(1), k = q.size(2), kv_heads = cached.front().first.size(1), group = heads / kv_heads;
  torch::Tensor out = at::empty(q.sizes(), q.options());
  const float* q_data = q.data_ptr<float>();
  float* out_data = out.data_ptr<float>();
  const int64_t tasks = static_cast<int64_t>(cached.size()) * kv_heads;
  const int64_t work = 2 * group * k * cached.front().first.size(0);  // multiply-adds of a task
  at::parallel_for(0, tasks, std::max<int64_t>((64 << 10) / work, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / kv_heads, head = task % kv_heads;
      const auto& [keys, values] = cached[b];
      const int64_t total = keys.size(0), length = options.window > 0 ? std::min(total, options.window) : total;
      const int64_t start = (total - length) * kv_heads * k + head * k;
      scores.resize(group * length);
      const int64_t row = (b * heads + head * group) * k;
      kernels().attend(q_data + row, keys.data_ptr<float>() + start, values.data_ptr<float>() + start, kv_heads * k,
                       length, group, k, static_cast<float>(options.scale), static_cast<float>(options.softcap),
                       scores.data(), out_data + row);
    }
  });
  return out;
}

}  // namespace

torch::Tensor ragged_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const std::vector<int64_t>& offsets, const AttentionOptions& options) {
  MOESAIC_ASSERT(offsets.back() == q.size(0) && k.sizes() == v.sizes() && q.size(1) % k.size(1) == 0);
  const bool grad = torch::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  if (options.softcap == 0 && q.is_cpu()) {
    if (grad) return CpuFlashFunction::apply(q, k, v, offsets, options.scale, options.window);
    return CpuFlashFunction::run(q, k, v, offsets, options.scale, options.window).out;
  }
  if (options.softcap == 0 && q.element_size() == 2) return cuda_flash_attention(q, k, v, offsets, options);
  std::vector<torch::Tensor> parts;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
    parts.push_back(options.softcap == 0 ? fused_attention(rows(q), rows(k), rows(v), options)
                                         : plain_attention(rows(q), rows(k), rows(v), options));
  }
  return at::cat(parts);
}

torch::Tensor cached_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, int64_t layer,
                               const Pass& pass, const AttentionOptions& options) {
  const std::vector<int64_t>& offsets = pass.offsets;
  const int64_t batch = static_cast<int64_t>(offsets.size()) - 1;
  bool fresh = true;   // nothing cached yet
  bool single = true;  // one row per sequence
  std::vector<std::pair<torch::Tensor, torch::Tensor>> cached(batch);
  for (int64_t b = 0; b < batch; ++b) {
    auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
    const int64_t count = offsets[b + 1] - offsets[b];
    fresh = fresh && count > 0 && pass.cache->length(b) == 0;
    single = single && count == 1;
    if (count > 0) cached[b] = pass.cache->append(layer, b, rows(k), rows(v));
  }
  if (fresh) return ragged_attention(q, k, v, offsets, options);
  if (single && q.is_cpu() && q.scalar_type() == torch::kFloat32)
    return decode_attention(q.contiguous(), cached, options);
  std::vector<torch::Tensor> parts;
  for (int64_t b = 0; b < batch; ++b) {
    if (offsets[b] == offsets[b + 1]) continue;
    const torch::Tensor rows = q.slice(0, offsets[b], offsets[b + 1]);
    const auto& [keys, values] = cached[b];
    parts.push_back(options.softcap == 0 ? fused_attention(rows, keys, values, options)
                                         : plain_attention(rows, keys, values, options));
  }
  return at::cat(parts);
}

SelfAttentionImpl::SelfAttentionImpl(const SelfAttentionConfig& config, int64_t layer,
                                     const torch::TensorOptions& options)
    : config_(config),
      layer_(layer),
      qkv_(config.hidden_size,
           {config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim},
           config.qkv_bias, options, {config.heads, config.kv_heads, config.kv_heads}),
      o_(config.heads * config.head_dim, {config.hidden_size}, config.o_bias, options) {
  register_module("q_proj", qkv_.members()[0]);
  register_module("k_proj", qkv_.members()[1]);
  register_module("v_proj", qkv_.members()[2]);
  register_module("o_proj", o_.members()[0]);
  if (config.qk_norm) {
    q_norm_ = register_module("q_norm", RmsNorm(config.head_dim, config.norm_eps, config.norm_offset, options));
    k_norm_ = register_module("k_norm", RmsNorm(config.head_dim, config.norm_eps, config.norm_offset, options));
  }
}

torch::Tensor SelfAttentionImpl::forward(const torch::Tensor& x, Pass& pass) {
  const int64_t rows = x.size(0), k_width = config_.head_dim;
  const auto parts = qkv_.parts(x, pass);
  torch::Tensor q = parts[0].view({rows, config_.heads, k_width});
  torch::Tensor k = parts[1].view({rows, config_.kv_heads, k_width});
  torch::Tensor v = parts[2].view({rows, config_.kv_heads, k_width});
  if (config_.qk_norm) {
    q = q_normed_slot_.apply(q_norm_->forward(q), pass);
    k = k_normed_slot_.apply(k_norm_->forward(k), pass);
  }
  const RotaryTables& tables = config_.local_rope ? pass.rope_local : pass.rope;
  q = apply_rope(q, tables);
  k = apply_rope(k, tables);
  const torch::Tensor mixed = pass.cache ? cached_attention(q, k, v, layer_, pass, config_.options)
                                         : ragged_attention(q, k, v, pass.offsets, config_.options);
  return o_.forward(mixed.reshape({rows, config_.heads * k_width}), pass);
}

void SelfAttentionImpl::add_sites(const std::string& path, Sites& sites) {
  const int64_t d = config_.hidden_size, k = config_.head_dim;
  auto add = [&](const char* name, Role role, LinearGroup& group, int64_t index, int64_t heads, ScaleSlot* normed) {
    const std::string site = path + name;
    const int64_t out = group.outs()[index], width = heads > 0 ? k : out;
    sites.linears.push_back({site, role, layer_, &group, index, group.in(), out});
    sites.scales.push_back({site, role, layer_, ScaleKind::kInput, &group.input_slot(index), 0, group.in(), d});
    sites.scales.push_back({site, role, layer_, ScaleKind::kOutput, &group.output_slot(index), heads, width, d});
    if (normed != nullptr) sites.scales.push_back({site, role, layer_, ScaleKind::kPostHeadNorm, normed, heads, k, d});
  };
  const bool norm = config_.qk_norm;
  add(".q_proj", Role::kQuery, qkv_, 0, config_.heads, norm ? &q_normed_slot_ : nullptr);
  add(".k_proj", Role::kKey, qkv_, 1, config_.kv_heads, norm ? &k_normed_slot_ : nullptr);
  add(".v_proj", Role::kValue, qkv_, 2, config_.kv_heads, nullptr);
  add(".o_proj", Role::kAttentionOut, o_, 0, 0, nullptr);
}

int64_t SelfAttentionImpl::saved_per_row(bool whole) const {
  const int64_t q = config_.heads * config_.head_dim, kv = config_.kv_heads * config_.head_dim;
  // Rotated queries and keys, values, the output and its log-sum-exp.
  int64_t numbers = 2 * q + 2 * kv + config_.heads;
  if (whole || qkv_.delta) numbers += config_.hidden_size;  // the normed input
  for (const LinearGroup* group : {&qkv_, &o_}) {
    if (group->delta) numbers += group->delta->saved_per_row();
  }
  return numbers;
}

void SelfAttentionImpl::quantize_int8() {
  qkv_.quantize_int8();
  o_.quantize_int8();
}

}  // namespace moesaic::nn
