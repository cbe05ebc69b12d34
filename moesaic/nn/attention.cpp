#include "moesaic/nn/attention.h"

#include <ATen/Parallel.h>

#include <span>

#include "moesaic/base/check.h"
#include "moesaic/nn/dropout.h"
#include "moesaic/nn/half_rows.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/kv_cache.h"
#include "moesaic/nn/rope.h"
#include "moesaic/nn/source.h"
#include "moesaic/nn/split.h"

namespace moesaic::nn {
namespace {

/// How many positions behind it one that is not causal sees, where it has a window.
int64_t behind(const AttentionOptions& attention) { return attention.behind < 0 ? attention.window : attention.behind; }

/// 0 where a query sees a key, -inf elsewhere: [S, T]; the S queries are the last of T positions.
torch::Tensor visibility_mask(int64_t queries, int64_t keys, const AttentionOptions& attention,
                              const torch::TensorOptions& options) {
  const auto integers = options.dtype(torch::kInt64);
  const torch::Tensor position = torch::arange(keys - queries, keys, integers).unsqueeze(1);
  const torch::Tensor key = torch::arange(keys, integers);
  const int64_t window = attention.window;
  torch::Tensor hidden;
  if (!attention.causal) {
    hidden = (key < position - window).logical_or(key > position + behind(attention));
  } else {
    hidden = key > position;
    if (window > 0) hidden = hidden.logical_or(key <= position - window);
  }
  if (attention.always > 0) hidden = hidden.logical_and(key >= attention.always);
  return torch::zeros({queries, keys}, options).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

/// What a fused attention call needs to know about visibility: a mask, or a flag, or (one query) nothing.
struct Visibility {
  bool causal = false;
  std::optional<torch::Tensor> mask;  // [S, T], or with the bias [H, S, T]
};
Visibility visibility(int64_t queries, int64_t keys, const AttentionOptions& attention,
                      const torch::TensorOptions& options) {
  if (attention.bias) return {false, attention.bias.ptr()->forward(queries, keys)};
  const int64_t nearest = attention.causal ? attention.window : std::min(attention.window, behind(attention));
  const bool windowed = attention.window > 0 && keys > nearest;
  if (!attention.causal && !windowed) return {};
  if (windowed || (queries > 1 && queries < keys)) return {false, visibility_mask(queries, keys, attention, options)};
  if (!attention.causal) return {};
  return {queries > 1, std::nullopt};
}

/// A mask as the scores [H_kv, g, S, T] take it.
std::optional<torch::Tensor> grouped_mask(const std::optional<torch::Tensor>& mask, int64_t kv_heads) {
  return mask && mask->dim() == 3 ? mask->unflatten(0, {kv_heads, mask->size(0) / kv_heads}) : mask;
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
  if (options.bias) {
    scores = scores + *grouped_mask(visibility(q.size(0), k.size(0), options, scores.options()).mask, kv_heads);
  } else if (options.causal || options.window > 0) {
    scores = scores + visibility_mask(q.size(0), k.size(0), options, scores.options().requires_grad(false));
  }
  const auto wide = q.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const torch::Tensor weights = at::softmax(scores, -1, wide).to(q.dtype());
  return at::matmul(weights, shared_heads(v, group)).permute({2, 0, 1, 3}).reshape(q.sizes());
}

/// One sequence by LibTorch's fused kernels; differentiable.
torch::Tensor fused_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                              const AttentionOptions& options) {
  auto seen = visibility(q.size(0), k.size(0), options, q.options().requires_grad(false));
  if (seen.mask && seen.mask->dim() == 3) seen.mask = seen.mask->unsqueeze(0);
  auto heads_first = [](const torch::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };  // [1, H, S, k]
  return at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), seen.mask, 0.0, seen.causal,
                                          options.scale, /*enable_gqa=*/true)
      .squeeze(0)
      .transpose(0, 1)
      .contiguous();
}

/// Rows [begin, end) of one sequence, and how many of its keys the last of them sees.
struct Stretch {
  size_t sequence;
  int64_t begin, end, keys;
};

using KeysValues = std::pair<torch::Tensor, torch::Tensor>;  // [T, H_kv, k] each

/// Whether own kernels attend: on the CPU, in float32 and, by way of it, bfloat16.
bool has_kernels(const torch::Tensor& q) {
  return q.is_cpu() && (q.scalar_type() == torch::kFloat32 || q.scalar_type() == torch::kBFloat16);
}

/// Rows of one head of a tensor [N, H, k]: where they lie, or in bfloat16 a float32 copy of them.
class HeadRows {
 public:
  HeadRows(const torch::Tensor& x, int64_t begin, int64_t end, int64_t head)
      : begin_(begin), rows_(end - begin), head_(head), k_(x.size(2)) {
    if (x.scalar_type() == torch::kFloat32) {
      stride_ = x.stride(0);
      data_ = x.data_ptr<float>() + begin * stride_ + head * k_;
      return;
    }
    copy_.resize(rows_ * k_);
    stride_ = k_;
    data_ = copy_.data();
    for (int64_t n = 0; n < rows_; ++n) widen(source(x) + n * x.stride(0), data_ + n * k_, k_);
  }
  /// Brings a copy back.
  void write(const torch::Tensor& x) const {
    for (int64_t n = 0; n < rows_ && !copy_.empty(); ++n) narrow(data_ + n * k_, source(x) + n * x.stride(0), k_);
  }
  float* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  c10::BFloat16* source(const torch::Tensor& x) const {
    return x.data_ptr<c10::BFloat16>() + begin_ * x.stride(0) + head_ * k_;
  }

  int64_t begin_, rows_, head_, k_, stride_ = 0;
  float* data_ = nullptr;
  std::vector<float> copy_;
};

/// What the rows of a stretch from `begin` on see through one query head. keys, values: of its KV head. bias: of the
/// stretch, [H, S, T], or undefined; it hides what is to be hidden.
SeenKeys seen_keys(const Stretch& rows, int64_t begin, int64_t head, const HeadRows& keys, const HeadRows& values,
                   int64_t k, const AttentionOptions& options, const torch::Tensor& bias) {
  SeenKeys seen{.keys = keys.data(),
                .values = values.data(),
                .stride = keys.stride(),
                .count = rows.keys,
                .k = k,
                .position = rows.keys - (rows.end - begin),
                .causal = options.causal && !bias.defined(),
                .window = bias.defined() ? 0 : options.window,
                .behind = behind(options),
                .scale = static_cast<float>(options.scale),
                .softcap = static_cast<float>(options.softcap),
                .bias = nullptr,
                .bias_stride = 0};
  if (bias.defined()) {
    seen.bias = bias.data_ptr<float>() + head * bias.stride(0) + (begin - rows.begin) * bias.stride(1);
    seen.bias_stride = bias.stride(1);
  }
  return seen;
}

/// The bias of each stretch, float32 [H, S, T]; undefined without one.
std::vector<torch::Tensor> biases_of(const std::vector<Stretch>& stretches, const AttentionOptions& options) {
  std::vector<torch::Tensor> biases(stretches.size());
  for (size_t i = 0; options.bias && i < stretches.size(); ++i) {
    const Stretch& rows = stretches[i];
    const torch::Tensor bias = options.bias.ptr()->forward(rows.end - rows.begin, rows.keys).to(torch::kFloat32);
    biases[i] = bias.stride(2) == 1 ? bias : bias.contiguous();
  }
  return biases;
}

/// Many positions on the CPU: a task per query head and some rows. q, out: [N, H, k], contiguous; log_sums: float32 [N,
/// H], or undefined.
void attend_stretches(const torch::Tensor& q, const std::vector<Stretch>& stretches,
                      const std::vector<torch::Tensor>& biases, const std::vector<KeysValues>& cached,
                      const AttentionOptions& options, const torch::Tensor& out, const torch::Tensor& log_sums) {
  constexpr int64_t kRows = 144;
  struct Task {
    size_t stretch;
    int64_t head, begin, end;
  };
  const int64_t heads = q.size(1), k = q.size(2);
  std::vector<Task> tasks;
  std::vector<KeysValues> wide(cached.size());
  for (size_t i = 0; i < stretches.size(); ++i) {
    const Stretch& rows = stretches[i];
    const auto& [keys, values] = cached[rows.sequence];
    wide[rows.sequence] = {keys.to(torch::kFloat32).contiguous(), values.to(torch::kFloat32).contiguous()};
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t n = rows.begin; n < rows.end; n += kRows)
        tasks.push_back({i, head, n, std::min(n + kRows, rows.end)});
    }
  }
  at::parallel_for(0, std::ssize(tasks), 1, [&](int64_t first, int64_t last) {
    for (const Task& task : std::span(tasks).subspan(first, last - first)) {
      const Stretch& rows = stretches[task.stretch];
      const auto& [all_keys, all_values] = wide[rows.sequence];
      const int64_t kv_head = task.head / (heads / all_keys.size(1));
      const HeadRows keys(all_keys, 0, rows.keys, kv_head), values(all_values, 0, rows.keys, kv_head);
      const HeadRows queries(q, task.begin, task.end, task.head), target(out, task.begin, task.end, task.head);
      const SeenKeys seen = seen_keys(rows, task.begin, task.head, keys, values, k, options, biases[task.stretch]);
      float* sums = log_sums.defined() ? log_sums.data_ptr<float>() + task.begin * heads + task.head : nullptr;
      kernels().attend_rows(queries.data(), queries.stride(), task.end - task.begin, seen, target.data(),
                            target.stride(), sums, heads);
      target.write(out);
    }
  });
}

/// A whole ragged batch on the CPU. A bias has no gradient here.
struct CpuAttention : torch::autograd::Function<CpuAttention> {
  static std::vector<Stretch> whole(const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets) {
    std::vector<Stretch> stretches;
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      if (offsets[b] == offsets[b + 1]) continue;  // no row of this sequence
      stretches.push_back({b, offsets[b], offsets[b + 1], key_offsets[b + 1] - key_offsets[b]});
    }
    return stretches;
  }

  /// q, k, v: contiguous.
  static torch::Tensor run(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                           const std::vector<Stretch>& stretches, const std::vector<torch::Tensor>& biases,
                           const std::vector<int64_t>& key_offsets, const AttentionOptions& options,
                           const torch::Tensor& log_sums) {
    std::vector<KeysValues> cached;
    for (size_t b = 0; b + 1 < key_offsets.size(); ++b) {
      auto rows = [&](const torch::Tensor& x) { return x.slice(0, key_offsets[b], key_offsets[b + 1]); };
      cached.emplace_back(rows(k), rows(v));
    }
    torch::Tensor out = at::empty(q.sizes(), q.options().requires_grad(false));
    attend_stretches(q, stretches, biases, cached, options, out, log_sums);
    return out;
  }

  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& queries,
                               const torch::Tensor& keys, const torch::Tensor& values,
                               const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets,
                               const AttentionOptions& options) {
    // Contiguous copies, so that the fused projection they are cut from can be freed.
    const torch::Tensor q = queries.contiguous(), k = keys.contiguous(), v = values.contiguous();
    const std::vector<Stretch> stretches = whole(offsets, key_offsets);
    const std::vector<torch::Tensor> biases = biases_of(stretches, options);
    const torch::Tensor log_sums = torch::empty({q.size(0), q.size(1)}, torch::kFloat32);
    const torch::Tensor out = run(q, k, v, stretches, biases, key_offsets, options, log_sums);
    torch::autograd::variable_list saved{q, k, v, out, log_sums};
    if (options.bias) saved.insert(saved.end(), biases.begin(), biases.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["offsets"] = offsets;
    ctx->saved_data["key_offsets"] = key_offsets;
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["softcap"] = options.softcap;
    ctx->saved_data["window"] = options.window;
    ctx->saved_data["behind"] = options.behind;
    ctx->saved_data["causal"] = options.causal;
    return out;
  }

  /// A task per sequence and KV head.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    constexpr size_t kBiases = 5;  // where they begin
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &log_sums = saved[4];
    const std::vector<int64_t> key_offsets = ctx->saved_data["key_offsets"].toIntVector();
    const std::vector<Stretch> stretches = whole(ctx->saved_data["offsets"].toIntVector(), key_offsets);
    const AttentionOptions options{.scale = ctx->saved_data["scale"].toDouble(),
                                   .softcap = ctx->saved_data["softcap"].toDouble(),
                                   .window = ctx->saved_data["window"].toInt(),
                                   .causal = ctx->saved_data["causal"].toBool(),
                                   .behind = ctx->saved_data["behind"].toInt()};
    const int64_t heads = q.size(1), kv_heads = k.size(1), group = heads / kv_heads;
    const torch::Tensor d_out = grads[0].contiguous();
    torch::Tensor dq = at::empty_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);
    at::parallel_for(0, std::ssize(stretches) * kv_heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const size_t index = task / kv_heads;
        const Stretch& rows = stretches[index];
        const int64_t kv_head = task % kv_heads, key = key_offsets[rows.sequence];
        auto of_keys = [&](const torch::Tensor& x) { return HeadRows(x, key, key + rows.keys, kv_head); };
        const HeadRows keys = of_keys(k), values = of_keys(v), d_keys = of_keys(dk), d_values = of_keys(dv);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          auto of_rows = [&](const torch::Tensor& x) { return HeadRows(x, rows.begin, rows.end, head); };
          const HeadRows queries = of_rows(q), given = of_rows(out), d_given = of_rows(d_out), d_queries = of_rows(dq);
          const torch::Tensor bias = saved.size() > kBiases ? saved[kBiases + index] : torch::Tensor();
          const SeenKeys seen = seen_keys(rows, rows.begin, head, keys, values, q.size(2), options, bias);
          kernels().attend_backward(queries.data(), queries.stride(), given.data(), d_given.data(), given.stride(),
                                    log_sums.data_ptr<float>() + rows.begin * heads + head, heads,
                                    rows.end - rows.begin, seen, d_queries.data(), d_queries.stride(), d_keys.data(),
                                    d_values.data());
          d_queries.write(dq);
        }
        d_keys.write(dk);
        d_values.write(dv);
      }
    });
    return {dq, dk, dv, {}, {}, {}};
  }
};

/// The whole ragged batch on a GPU in half precision, without a bias; differentiable.
torch::Tensor cuda_flash_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                   const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets,
                                   const AttentionOptions& options) {
  auto bounds = [&](const std::vector<int64_t>& rows) { return torch::tensor(rows, torch::kInt32).to(q.device()); };
  auto longest = [](const std::vector<int64_t>& rows) {
    int64_t most = 0;
    for (size_t b = 0; b + 1 < rows.size(); ++b) most = std::max(most, rows[b + 1] - rows[b]);
    return most;
  };
  const bool windowed = options.window > 0;
  const int64_t before = options.causal ? options.window - 1 : options.window;
  const std::optional<int64_t> left = windowed ? std::optional(before) : std::nullopt;
  const std::optional<int64_t> right = windowed ? std::optional(options.causal ? 0 : behind(options)) : std::nullopt;
  return std::get<0>(at::_flash_attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), bounds(offsets),
                                                  bounds(key_offsets), longest(offsets), longest(key_offsets), 0.0,
                                                  options.causal, false, options.scale, left, right));
}

/// Single positions, float32 on the CPU: a task per row and KV head. q, out: [N, H, k], contiguous.
void decode_attention(const torch::Tensor& q, const std::vector<Stretch>& singles,
                      const std::vector<KeysValues>& cached, const AttentionOptions& options,
                      const torch::Tensor& out) {
  if (singles.empty()) return;
  const int64_t heads = q.size(1), k = q.size(2), kv_heads = cached[singles[0].sequence].first.size(1);
  const int64_t group = heads / kv_heads;
  const float* q_data = q.data_ptr<float>();
  float* out_data = out.data_ptr<float>();
  const int64_t tasks = std::ssize(singles) * kv_heads;
  const int64_t work = 2 * group * k * singles[0].keys;  // multiply-adds of a task
  std::vector<torch::Tensor> biases;                     // [H, 1, T] of each row
  for (const Stretch& row : singles) {
    if (options.bias) biases.push_back(options.bias.ptr()->forward(1, row.keys));
  }
  at::parallel_for(0, tasks, std::max<int64_t>((64 << 10) / work, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / kv_heads, head = task % kv_heads;
      const auto& [keys, values] = cached[singles[i].sequence];
      const int64_t total = singles[i].keys, length = options.window > 0 ? std::min(total, options.window) : total;
      const int64_t start = (total - length) * kv_heads * k + head * k;
      scores.resize(group * length);
      const int64_t row = (singles[i].begin * heads + head * group) * k;
      const int64_t bias_stride = biases.empty() ? 0 : biases[i].stride(0);
      const float* bias = biases.empty() ? nullptr : biases[i].data_ptr<float>() + head * group * bias_stride;
      kernels().attend(q_data + row, keys.data_ptr<float>() + start, values.data_ptr<float>() + start, kv_heads * k,
                       length, group, k, static_cast<float>(options.scale), static_cast<float>(options.softcap), bias,
                       bias_stride, scores.data(), out_data + row);
    }
  });
}

/// Queries against the keys and values of their own sequences, where there are queries; the rows are a sequence's last.
torch::Tensor attention_to(const torch::Tensor& queries, const std::vector<int64_t>& offsets,
                           const std::vector<KeysValues>& cached, const AttentionOptions& options) {
  const torch::Tensor q = queries.contiguous();
  torch::Tensor out = at::empty(q.sizes(), q.options());
  std::vector<Stretch> singles, many;
  for (size_t b = 0; b < cached.size(); ++b) {
    if (offsets[b] == offsets[b + 1]) continue;
    const Stretch rows{b, offsets[b], offsets[b + 1], cached[b].first.size(0)};
    // Of a text that is read, a row alone is computed as beside others.
    const bool single = rows.end - rows.begin == 1 && AlikeRows::now() != AlikeRows::Number::kMany;
    if (has_kernels(q) && !(single && q.scalar_type() == torch::kBFloat16)) {
      (single ? singles : many).push_back(rows);
      continue;
    }
    const torch::Tensor own = q.slice(0, rows.begin, rows.end);
    const auto& [k, v] = cached[b];
    out.slice(0, rows.begin, rows.end)
        .copy_(options.softcap == 0 ? fused_attention(own, k, v, options) : plain_attention(own, k, v, options));
  }
  decode_attention(q, singles, cached, options, out);
  attend_stretches(q, many, biases_of(many, options), cached, options, out, {});
  return out;
}

/// Appends the three points of a linear to the sites.
struct SiteAdder {
  const std::string& path;
  int64_t layer, hidden;
  Sites& sites;

  /// heads: into how many its output is cut, 0 = none; normed: the slot behind a per-head norm, or nullptr.
  void add(const char* name, Role role, LinearGroup& group, int64_t index, int64_t heads,
           ScaleSlot* normed = nullptr) const {
    const std::string site = path + "." + name;
    const int64_t out = group.outs()[index], width = heads > 0 ? out / heads : out;
    sites.linears.push_back({site, role, layer, &group, index, group.in(), out});
    sites.scales.push_back({site, role, layer, ScaleKind::kInput, &group.input_slot(index), 0, group.in(), hidden});
    sites.scales.push_back({site, role, layer, ScaleKind::kOutput, &group.output_slot(index), heads, width, hidden});
    if (normed != nullptr) {
      sites.scales.push_back({site, role, layer, ScaleKind::kPostHeadNorm, normed, heads, width, hidden});
    }
  }
};

int64_t saved_by_deltas(std::initializer_list<const LinearGroup*> groups) {
  int64_t numbers = 0;
  for (const LinearGroup* group : groups) {
    if (group->delta) numbers += group->delta->saved_per_row();
  }
  return numbers;
}

}  // namespace

torch::Tensor ragged_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const std::vector<int64_t>& offsets, const AttentionOptions& options) {
  return ragged_attention(q, k, v, offsets, offsets, options);
}

torch::Tensor ragged_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const std::vector<int64_t>& offsets, const std::vector<int64_t>& key_offsets,
                               const AttentionOptions& options) {
  MOESAIC_ASSERT(offsets.back() == q.size(0) && key_offsets.back() == k.size(0) &&
                 offsets.size() == key_offsets.size() && options.always == 0 && k.sizes() == v.sizes() &&
                 q.size(1) % k.size(1) == 0);
  const bool grad = torch::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  const bool bias_learns = torch::GradMode::is_enabled() && options.bias && options.bias->weight.requires_grad();
  if (has_kernels(q) && !bias_learns) {
    if (grad) return CpuAttention::apply(q, k, v, offsets, key_offsets, options);
    const auto stretches = CpuAttention::whole(offsets, key_offsets);
    return CpuAttention::run(q.contiguous(), k.contiguous(), v.contiguous(), stretches, biases_of(stretches, options),
                             key_offsets, options, {});
  }
  const bool plain = options.softcap > 0 || bias_learns || q.scalar_type() == torch::kFloat64;
  if (!plain && !options.bias && q.element_size() == 2)
    return cuda_flash_attention(q, k, v, offsets, key_offsets, options);
  std::vector<torch::Tensor> parts;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
    auto key_rows = [&](const torch::Tensor& x) { return x.slice(0, key_offsets[b], key_offsets[b + 1]); };
    if (offsets[b] == offsets[b + 1]) continue;
    parts.push_back(plain ? plain_attention(rows(q), key_rows(k), key_rows(v), options)
                          : fused_attention(rows(q), key_rows(k), key_rows(v), options));
  }
  return at::cat(parts);
}

torch::Tensor cached_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, int64_t layer,
                               const Pass& pass, const AttentionOptions& options) {
  const std::vector<int64_t>& offsets = pass.offsets;
  const int64_t batch = static_cast<int64_t>(offsets.size()) - 1;
  bool fresh = AlikeRows::now() == AlikeRows::Number::kAny;  // nothing cached yet
  std::vector<KeysValues> cached(batch);
  for (int64_t b = 0; b < batch; ++b) {
    auto rows = [&](const torch::Tensor& x) { return x.slice(0, offsets[b], offsets[b + 1]); };
    const int64_t count = offsets[b + 1] - offsets[b];
    fresh = fresh && count > 0 && pass.cache->length(b) == 0;
    if (count > 0) cached[b] = pass.cache->append(layer, b, rows(k), rows(v));
  }
  return fresh ? ragged_attention(q, k, v, offsets, options) : attention_to(q, offsets, cached, options);
}

SelfAttentionImpl::SelfAttentionImpl(const SelfAttentionConfig& config, int64_t layer,
                                     const torch::TensorOptions& options)
    : config_(config),
      layer_(layer),
      qkv_(config.hidden_size,
           {config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim},
           config.qkv_bias, options, {config.heads, config.kv_heads, config.kv_heads}),
      o_(config.heads * config.head_dim, {config.hidden_size}, config.o_bias, options) {
  register_module(config.names.q, qkv_.members()[0]);
  register_module(config.names.k, qkv_.members()[1]);
  register_module(config.names.v, qkv_.members()[2]);
  register_module(config.names.o, o_.members()[0]);
  if (config.owns_bias) register_module("relative_attention_bias", config_.options.bias);
  if (config.qk_norm) {
    auto norm = [&](const char* name, int64_t heads) {
      const int64_t width = config.flat_qk_norm ? heads * config.head_dim : config.head_dim;
      return register_module(name, RmsNorm(width, config.norm_eps, config.norm_offset, options));
    };
    q_norm_ = norm("q_norm", config.heads);
    k_norm_ = norm("k_norm", config.kv_heads);
  }
}

torch::Tensor SelfAttentionImpl::forward(const torch::Tensor& x, Pass& pass) {
  const int64_t rows = x.size(0), k_width = config_.head_dim;
  const auto parts = qkv_.parts(x, pass);
  torch::Tensor q = parts[0].view({rows, config_.heads, k_width});
  torch::Tensor k = parts[1].view({rows, config_.kv_heads, k_width});
  torch::Tensor v = parts[2].view({rows, config_.kv_heads, k_width});
  if (config_.qk_norm) {
    auto normed = [&](RmsNorm& norm, const torch::Tensor& x) {
      return config_.flat_qk_norm ? norm->forward(x.flatten(1)).view(x.sizes()) : norm->forward(x);
    };
    q = q_normed_slot_.apply(normed(q_norm_, q), pass);
    k = k_normed_slot_.apply(normed(k_norm_, k), pass);
  }
  if (config_.clip > 0) {
    for (torch::Tensor* x : {&q, &k, &v}) *x = x->clamp(-config_.clip, config_.clip);
  }
  if (config_.rotary) {
    const RotaryTables& tables = config_.local_rope ? pass.rope_local : pass.rope;
    q = apply_rope(q, tables);
    k = apply_rope(k, tables);
  }
  v = drop_keys(v, pass);
  const int64_t cache_layer = config_.cache_layer < 0 ? layer_ : config_.cache_layer;
  const torch::Tensor mixed = pass.cache ? cached_attention(q, k, v, cache_layer, pass, config_.options)
                                         : ragged_attention(q, k, v, pass.offsets, config_.options);
  return o_.forward(mixed.reshape({rows, config_.heads * k_width}), pass);
}

void SelfAttentionImpl::add_sites(const std::string& path, Sites& sites) {
  const SiteAdder adder{path, layer_, config_.hidden_size, sites};
  const bool norm = config_.qk_norm;
  const AttentionNames& names = config_.names;
  adder.add(names.q, Role::kQuery, qkv_, 0, config_.heads, norm ? &q_normed_slot_ : nullptr);
  adder.add(names.k, Role::kKey, qkv_, 1, config_.kv_heads, norm ? &k_normed_slot_ : nullptr);
  adder.add(names.v, Role::kValue, qkv_, 2, config_.kv_heads);
  adder.add(names.o, Role::kAttentionOut, o_, 0, 0);
}

int64_t SelfAttentionImpl::saved_per_row(bool whole) const {
  const int64_t q = config_.heads * config_.head_dim, kv = config_.kv_heads * config_.head_dim;
  // Rotated queries and keys, values, the output and its log-sum-exp.
  int64_t numbers = 2 * q + 2 * kv + config_.heads;
  if (whole || qkv_.delta) numbers += config_.hidden_size;  // the normed input
  return numbers + saved_by_deltas({&qkv_, &o_});
}

void SelfAttentionImpl::quantize_int8() {
  qkv_.quantize_int8();
  o_.quantize_int8();
}

MergedAttentionImpl::MergedAttentionImpl(const SelfAttentionConfig& config, int64_t layer,
                                         const torch::TensorOptions& options)
    : config_(config),
      layer_(layer),
      q_(config.hidden_size, {config.heads * config.head_dim}, config.qkv_bias, options, {config.heads}),
      kv_(config.hidden_size, {config.kv_heads * config.head_dim, config.kv_heads * config.head_dim}, config.qkv_bias,
          options, {config.kv_heads, config.kv_heads}),
      o_(config.heads * config.head_dim, {config.hidden_size}, config.o_bias, options) {
  register_module(config.names.q, q_.members()[0]);
  register_module(config.names.k, kv_.members()[0]);
  register_module(config.names.v, kv_.members()[1]);
  register_module(config.names.o, o_.members()[0]);
  q_norm_ = register_module("q_norm", RmsNorm(config.head_dim, config.norm_eps, config.norm_offset, options));
  k_norm_ = register_module("k_norm", RmsNorm(config.head_dim, config.norm_eps, config.norm_offset, options));
}

/// Of the rows of `pass`, keys normed.
KeysValues MergedAttentionImpl::keys_values(const torch::Tensor& x, Pass& pass) {
  const auto parts = kv_.parts(x, pass);
  const std::vector<int64_t> shape{x.size(0), config_.kv_heads, config_.head_dim};
  return {k_normed_slot_.apply(k_norm_->forward(parts[0].view(shape)), pass), parts[1].view(shape)};
}

torch::Tensor MergedAttentionImpl::forward(const torch::Tensor& x, Pass& pass) {
  MOESAIC_ASSERT(pass.source != nullptr);
  const Source& source = *pass.source;
  const int64_t rows = x.size(0), batch = std::ssize(pass.offsets) - 1;
  const RotaryTables& tables = config_.local_rope ? pass.rope_local : pass.rope;
  const torch::Tensor heads = q_.forward(x, pass).view({rows, config_.heads, config_.head_dim});
  const torch::Tensor q = apply_rope(q_normed_slot_.apply(q_norm_->forward(heads), pass), tables);
  auto [k, v] = keys_values(x, pass);
  k = apply_rope(k, tables);
  KeysValues of_source;
  if (source.states.defined()) {
    Pass over = pass.over_source();
    of_source = keys_values(source.states, over);
  }
  // The source's keys stand before the text's, whose rows are then the last positions.
  std::vector<KeysValues> merged(batch);
  std::vector<int64_t> key_offsets{0}, read(batch);
  bool beyond_window = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = pass.offsets[b], end = pass.offsets[b + 1];
    const int64_t from = source.offsets[b], to = source.offsets[b + 1];
    KeysValues before, own{k.slice(0, begin, end), v.slice(0, begin, end)};
    if (from < to) before = {of_source.first.slice(0, from, to), of_source.second.slice(0, from, to)};
    if (source.kept != nullptr) {
      if (from < to) source.kept->put(config_.cache_layer, b, before.first, before.second);
      before = source.kept->at(config_.cache_layer, b);
      if (begin < end) own = pass.cache->append(config_.cache_layer, b, own.first, own.second);
    }
    if (begin < end) {
      read[b] = before.first.size(0);
      merged[b] = {at::cat({before.first, own.first}), at::cat({before.second, own.second})};
      beyond_window = beyond_window || (config_.options.window > 0 && own.first.size(0) > config_.options.window);
    }
    key_offsets.push_back(key_offsets.back() + (begin < end ? merged[b].first.size(0) : 0));
  }
  AttentionOptions options = config_.options;
  torch::Tensor mixed;
  if (beyond_window) {
    std::vector<torch::Tensor> parts;
    for (int64_t b = 0; b < batch; ++b) {
      if (pass.offsets[b] == pass.offsets[b + 1]) continue;
      options.always = read[b];
      const torch::Tensor own = q.slice(0, pass.offsets[b], pass.offsets[b + 1]);
      parts.push_back(options.softcap > 0 || own.scalar_type() == torch::kFloat64
                          ? plain_attention(own, merged[b].first, merged[b].second, options)
                          : fused_attention(own, merged[b].first, merged[b].second, options));
    }
    mixed = at::cat(parts);
  } else {
    options.window = 0;
    if (source.kept != nullptr) {
      mixed = attention_to(q, pass.offsets, merged, options);
    } else {
      std::vector<torch::Tensor> keys, values;
      for (const KeysValues& each : merged) {
        keys.push_back(each.first);
        values.push_back(each.second);
      }
      mixed = ragged_attention(q, at::cat(keys), at::cat(values), pass.offsets, key_offsets, options);
    }
  }
  return o_.forward(mixed.reshape({rows, config_.heads * config_.head_dim}), pass);
}

void MergedAttentionImpl::add_sites(const std::string& path, Sites& sites) {
  const SiteAdder adder{path, layer_, config_.hidden_size, sites};
  adder.add(config_.names.q, Role::kQuery, q_, 0, config_.heads, &q_normed_slot_);
  adder.add(config_.names.k, Role::kKey, kv_, 0, config_.kv_heads, &k_normed_slot_);
  adder.add(config_.names.v, Role::kValue, kv_, 1, config_.kv_heads);
  adder.add(config_.names.o, Role::kAttentionOut, o_, 0, 0);
}

int64_t MergedAttentionImpl::saved_per_row(bool whole) const {
  const int64_t q = config_.heads * config_.head_dim, kv = config_.kv_heads * config_.head_dim;
  // As self-attention, and keys and values once more, those of the source among them.
  int64_t numbers = 2 * q + 6 * kv + config_.heads;
  if (whole || q_.delta || kv_.delta) numbers += config_.hidden_size;  // the normed input
  return numbers + saved_by_deltas({&q_, &kv_, &o_});
}

void MergedAttentionImpl::quantize_int8() {
  q_.quantize_int8();
  kv_.quantize_int8();
  o_.quantize_int8();
}

namespace {

int64_t source_size(const SelfAttentionConfig& config) {
  return config.source_size > 0 ? config.source_size : config.hidden_size;
}

}  // namespace

CrossAttentionImpl::CrossAttentionImpl(const SelfAttentionConfig& config, int64_t layer,
                                       const torch::TensorOptions& options)
    : config_(config),
      layer_(layer),
      q_(config.hidden_size, {config.heads * config.head_dim}, config.qkv_bias, options, {config.heads}),
      kv_(source_size(config), {config.kv_heads * config.head_dim, config.kv_heads * config.head_dim}, config.qkv_bias,
          options, {config.kv_heads, config.kv_heads}),
      o_(config.heads * config.head_dim, {config.hidden_size}, config.o_bias, options) {
  register_module(config.names.q, q_.members()[0]);
  register_module(config.names.k, kv_.members()[0]);
  register_module(config.names.v, kv_.members()[1]);
  register_module(config.names.o, o_.members()[0]);
}

torch::Tensor CrossAttentionImpl::forward(const torch::Tensor& x, Pass& pass) {
  MOESAIC_ASSERT(pass.source != nullptr);
  const Source& source = *pass.source;
  const int64_t rows = x.size(0), batch = static_cast<int64_t>(pass.offsets.size()) - 1;
  const torch::Tensor q = q_.forward(x, pass).view({rows, config_.heads, config_.head_dim});
  torch::Tensor k, v;
  if (source.states.defined()) {
    Pass over = pass.over_source();
    const auto parts = kv_.parts(source.states, over);
    k = parts[0].view({source.states.size(0), config_.kv_heads, config_.head_dim});
    v = drop_keys(parts[1].view({source.states.size(0), config_.kv_heads, config_.head_dim}), pass);
  }
  torch::Tensor mixed;
  if (source.kept == nullptr) {
    mixed = ragged_attention(q, k, v, pass.offsets, source.offsets, config_.options);
  } else {
    // Neighbours that share a source are one sequence here: their rows see all of it, and nothing of each other.
    std::vector<KeysValues> kept;
    std::vector<int64_t> offsets{0};
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t begin = source.offsets[b], end = source.offsets[b + 1];
      if (begin < end) source.kept->put(config_.cache_layer, b, k.slice(0, begin, end), v.slice(0, begin, end));
      const auto& pair = source.kept->at(config_.cache_layer, b);
      if (kept.empty() || !pair.first.is_same(kept.back().first)) {
        kept.push_back(pair);
        offsets.push_back(0);
      }
      offsets.back() = pass.offsets[b + 1];
    }
    mixed = attention_to(q, offsets, kept, config_.options);
  }
  return o_.forward(mixed.reshape({rows, config_.heads * config_.head_dim}), pass);
}

void CrossAttentionImpl::add_sites(const std::string& path, Sites& sites) {
  const SiteAdder adder{path, layer_, config_.hidden_size, sites};
  const SiteAdder of_source{path, layer_, source_size(config_), sites};
  adder.add(config_.names.q, Role::kQuery, q_, 0, config_.heads);
  of_source.add(config_.names.k, Role::kKey, kv_, 0, config_.kv_heads);
  of_source.add(config_.names.v, Role::kValue, kv_, 1, config_.kv_heads);
  adder.add(config_.names.o, Role::kAttentionOut, o_, 0, 0);
}

int64_t CrossAttentionImpl::saved_per_row(bool whole) const {
  const int64_t q = config_.heads * config_.head_dim, kv = config_.kv_heads * config_.head_dim;
  int64_t numbers = 2 * q + 2 * kv + config_.heads;
  if (whole || q_.delta) numbers += config_.hidden_size;  // the normed input
  return numbers + saved_by_deltas({&q_, &kv_, &o_});
}

void CrossAttentionImpl::quantize_int8() {
  q_.quantize_int8();
  kv_.quantize_int8();
  o_.quantize_int8();
}

}  // namespace moesaic::nn
