#include "moesaic/moe/low_rank.h"

#include <ATen/Parallel.h>

#include "moesaic/base/check.h"
#include "moesaic/moe/wide_rows.h"
#include "moesaic/nn/dropout.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::moe {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps a matrix alive in an autograd context.
struct KeptMatrix : torch::CustomClassHolder {
  explicit KeptMatrix(std::shared_ptr<nn::Matrix> m) : matrix(std::move(m)) {}
  std::shared_ptr<nn::Matrix> matrix;
};

/// What `JointLinear` needs of a group for one call.
struct JointWeights {
  std::shared_ptr<nn::Matrix> matrix;  // W [O, in], frozen; nullptr: y is made elsewhere
  torch::Tensor bias;                  // [O] or undefined
  torch::Tensor down;                  // [K, in], float32: every A, then the router weights
  int64_t rank_rows;                   // rows of `down` that are A's
  std::vector<int64_t> leaf_rows;      // rows of each leaf, in order
  int64_t first_trained;               // row of `down` before which no leaf trains: 0, rank_rows or K
};

/// x [N, in] -> U = x A^T [N, sum E*r], L = fp32(x) W_r^T [N, sum E] and, with a matrix, y = x W^T + b [N, O].
/// With a float32 x, U and L are one GEMM. Saves x only.
struct JointLinear : torch::autograd::Function<JointLinear> {
  static variable_list forward(AutogradContext* ctx, const torch::Tensor& x, const JointWeights* joint,
                               at::TensorList leaves) {
    torch::Tensor u, logits;
    const int64_t router_rows = joint->down.size(0) - joint->rank_rows;
    if (x.scalar_type() == joint->down.scalar_type()) {
      const torch::Tensor c = nn::thin_dots(x, joint->down);
      u = c.narrow(1, 0, joint->rank_rows);
      logits = c.narrow(1, joint->rank_rows, router_rows);
    } else {
      u = nn::linear_rows(x, joint->down.narrow(0, 0, joint->rank_rows).to(x.scalar_type()), {});
      logits = torch::empty({x.size(0), router_rows}, joint->down.options());
      if (router_rows > 0) {
        const torch::Tensor routers = joint->down.narrow(0, joint->rank_rows, router_rows).t();
        for_wide_rows(x, [&](int64_t begin, int64_t count) {
          torch::Tensor rows = logits.narrow(0, begin, count);
          at::mm_out(rows, wide_rows(x, begin, count), routers);
        });
      }
    }
    ctx->save_for_backward({x});
    ctx->saved_data["down"] = joint->down;
    ctx->saved_data["rank_rows"] = joint->rank_rows;
    ctx->saved_data["leaf_rows"] = joint->leaf_rows;
    ctx->saved_data["first_trained"] = joint->first_trained;
    if (!joint->matrix) return {u, logits};
    ctx->saved_data["matrix"] = c10::IValue::make_capsule(c10::make_intrusive<KeptMatrix>(joint->matrix));
    return {u, logits, joint->matrix->product(x, joint->bias)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const torch::Tensor x = ctx->get_saved_variables()[0];
    const torch::Tensor down = ctx->saved_data["down"].toTensor();
    const int64_t rank_rows = ctx->saved_data["rank_rows"].toInt();
    const int64_t router_rows = down.size(0) - rank_rows;
    const std::vector<int64_t> leaf_rows = ctx->saved_data["leaf_rows"].toIntVector();
    const int64_t first = ctx->saved_data["first_trained"].toInt();
    const bool trains = first < down.size(0), ranks_train = trains && first == 0;
    const bool same_dtype = x.scalar_type() == down.scalar_type();

    torch::Tensor gx;
    if (ctx->needs_input_grad(0)) {
      if (grads.size() == 3) {
        const auto kept = c10::static_intrusive_pointer_cast<KeptMatrix>(ctx->saved_data["matrix"].toCapsule());
        gx = kept->matrix->product_back(grads[2]);
      } else {
        gx = torch::zeros_like(x);
      }
    }
    torch::Tensor gdown;  // [K - first, in] float32
    if (same_dtype) {
      const torch::Tensor gc = torch::cat({grads[0], grads[1]}, 1);
      if (trains) gdown = nn::thin_outer(gc.narrow(1, first, gc.size(1) - first), x, 1.0);
      if (gx.defined()) nn::thin_add(gc, down, 1.0, gx);
    } else {
      const torch::Tensor gu = grads[0].contiguous();
      if (ranks_train) gdown = at::mm(gu.t(), x).to(down.scalar_type());
      if (gx.defined()) nn::thin_add(gu, down.narrow(0, 0, rank_rows).to(x.scalar_type()), 1.0, gx);
      if (router_rows > 0) {
        const torch::Tensor routers = down.narrow(0, rank_rows, router_rows);
        torch::Tensor grouters = torch::zeros_like(routers);
        for_wide_rows(x, [&](int64_t begin, int64_t count) {
          const torch::Tensor gl = grads[1].narrow(0, begin, count);
          if (trains) grouters.addmm_(gl.t(), wide_rows(x, begin, count));
          if (gx.defined()) gx.narrow(0, begin, count).add_(at::mm(gl, routers).to(x.scalar_type()));
        });
        if (trains) gdown = ranks_train ? torch::cat({gdown, grouters}, 0) : grouters;
      }
    }
    variable_list result{gx, torch::Tensor()};
    int64_t row = 0;
    for (int64_t rows : leaf_rows) {
      result.push_back(row < first ? torch::Tensor() : gdown.narrow(0, row - first, rows));
      row += rows;
    }
    return result;
  }
};

/// y [N, O] += scale_j G_j B_j into the columns of each site j, in place. G: [N, sum E*r]; B_j: [E*r, out].
struct AddUp : torch::autograd::Function<AddUp> {
  static torch::Tensor forward(AutogradContext* ctx, torch::Tensor y, const torch::Tensor& g,
                               const std::vector<int64_t>& columns, const std::vector<double>& scales,
                               at::TensorList bs) {
    int64_t k = 0;
    for (size_t j = 0; j < bs.size(); ++j) {
      const torch::Tensor b = bs[j].to(y.scalar_type());
      nn::thin_add(g.narrow(1, k, b.size(0)), b, scales[j], y.narrow(1, columns[j], b.size(1)));
      k += b.size(0);
    }
    variable_list saved{g};
    saved.insert(saved.end(), bs.begin(), bs.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["columns"] = columns;
    ctx->saved_data["scales"] = scales;
    ctx->mark_dirty({y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor& g = saved[0];
    const std::vector<int64_t> columns = ctx->saved_data["columns"].toIntVector();
    const std::vector<double> scales = ctx->saved_data["scales"].toDoubleVector();
    const torch::Tensor& gy = grads[0];
    torch::Tensor gg;
    if (ctx->needs_input_grad(1)) gg = torch::empty(g.sizes(), g.options());
    variable_list result{gy, gg, torch::Tensor(), torch::Tensor()};
    int64_t k = 0;
    for (size_t j = 0; j < columns.size(); ++j) {
      const torch::Tensor& b = saved[j + 1];
      const torch::Tensor gy_j = gy.narrow(1, columns[j], b.size(1));
      const torch::Tensor gg_j = gg.defined() ? gg.narrow(1, k, b.size(0)) : gg;
      if (b.requires_grad()) {
        const torch::Tensor gb =
            nn::thin_outer(g.narrow(1, k, b.size(0)), gy_j, scales[j], b.to(gy.scalar_type()), gg_j);
        result.push_back(gb.to(b.scalar_type()));
      } else {
        if (gg_j.defined()) gg_j.copy_(at::mm(gy_j, b.to(gy.scalar_type()).t()).mul_(scales[j]));
        result.emplace_back();
      }
      k += b.size(0);
    }
    return result;
  }
};

/// The CPU kernel of `gate_ranks`, forward and backward, over rows; computes in float32. Sites with one expert pass U
/// through.
struct GateLayout {
  std::vector<int64_t> experts, ranks;
  std::vector<double> temperatures;
};

void gate_forward(const torch::Tensor& u, const torch::Tensor& logits, const GateLayout& layout, torch::Tensor& g,
                  torch::Tensor& s) {
  const float* u_data = u.data_ptr<float>();
  const float* l_data = logits.data_ptr<float>();
  float* g_data = g.mutable_data_ptr<float>();
  float* s_data = s.mutable_data_ptr<float>();
  const int64_t u_stride = u.stride(0), l_stride = logits.stride(0), g_stride = g.stride(0), s_stride = s.stride(0);
  at::parallel_for(0, u.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* u_row = u_data + n * u_stride;
      const float* l_row = l_data + n * l_stride;
      float* g_row = g_data + n * g_stride;
      float* s_row = s_data + n * s_stride;
      for (size_t j = 0; j < layout.experts.size(); ++j) {
        const int64_t experts = layout.experts[j], rank = layout.ranks[j];
        if (experts == 1) {
          for (int64_t i = 0; i < rank; ++i) *g_row++ = *u_row++;
          continue;
        }
        const float inverse_temperature = static_cast<float>(1.0 / layout.temperatures[j]);
        float largest = l_row[0];
        for (int64_t e = 1; e < experts; ++e) largest = std::max(largest, l_row[e]);
        float sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += s_row[e] = std::exp((l_row[e] - largest) * inverse_temperature);
        for (int64_t e = 0; e < experts; ++e) {
          s_row[e] /= sum;
          for (int64_t i = 0; i < rank; ++i) *g_row++ = *u_row++ * s_row[e];
        }
        l_row += experts;
        s_row += experts;
      }
    }
  });
}

struct GateRanks : torch::autograd::Function<GateRanks> {
  static torch::Tensor forward(AutogradContext* ctx, const torch::Tensor& u, const torch::Tensor& logits,
                               const GateLayout* layout) {
    const torch::Tensor wide = u.to(torch::kFloat32);
    torch::Tensor g = torch::empty({u.size(0), u.size(1)}, wide.options());
    torch::Tensor s = torch::empty({logits.size(0), logits.size(1)}, logits.options());
    gate_forward(wide, logits, *layout, g, s);
    ctx->save_for_backward({u, s});
    ctx->saved_data["experts"] = layout->experts;
    ctx->saved_data["ranks"] = layout->ranks;
    ctx->saved_data["temperatures"] = layout->temperatures;
    return g.to(u.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const torch::Tensor u = saved[0].to(torch::kFloat32);
    const torch::Tensor& s = saved[1];
    const GateLayout layout{ctx->saved_data["experts"].toIntVector(), ctx->saved_data["ranks"].toIntVector(),
                            ctx->saved_data["temperatures"].toDoubleVector()};
    const torch::Tensor gg = grads[0].to(torch::kFloat32).contiguous();
    torch::Tensor gu = torch::empty({u.size(0), u.size(1)}, u.options());
    torch::Tensor gl = torch::empty_like(s);
    const float* u_data = u.data_ptr<float>();
    const float* s_data = s.data_ptr<float>();
    const float* gg_data = gg.data_ptr<float>();
    float* gu_data = gu.mutable_data_ptr<float>();
    float* gl_data = gl.mutable_data_ptr<float>();
    const int64_t u_stride = u.stride(0);
    at::parallel_for(0, u.size(0), 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* u_row = u_data + n * u_stride;
        const float* gg_row = gg_data + n * gg.size(1);
        const float* s_row = s_data + n * s.size(1);
        float* gu_row = gu_data + n * gg.size(1);
        float* gl_row = gl_data + n * s.size(1);
        for (size_t j = 0; j < layout.experts.size(); ++j) {
          const int64_t experts = layout.experts[j], rank = layout.ranks[j];
          if (experts == 1) {
            for (int64_t i = 0; i < rank; ++i) *gu_row++ = *gg_row++;
            u_row += rank;
            continue;
          }
          float mean = 0;  // sum_e s_e gs_e
          for (int64_t e = 0; e < experts; ++e) {
            float gs = 0;
            for (int64_t i = 0; i < rank; ++i) {
              gs += *gg_row * *u_row++;
              *gu_row++ = *gg_row++ * s_row[e];
            }
            gl_row[e] = gs;
            mean += s_row[e] * gs;
          }
          const float inverse_temperature = static_cast<float>(1.0 / layout.temperatures[j]);
          for (int64_t e = 0; e < experts; ++e) gl_row[e] = s_row[e] * (gl_row[e] - mean) * inverse_temperature;
          gl_row += experts;
          s_row += experts;
        }
      }
    });
    return {gu.to(saved[0].scalar_type()), gl, torch::Tensor()};
  }
};

}  // namespace

torch::Tensor gate_ranks(const torch::Tensor& u, const torch::Tensor& logits, const std::vector<int64_t>& experts,
                         const std::vector<int64_t>& ranks, const std::vector<double>& temperatures) {
  const GateLayout layout{experts, ranks, temperatures};
  return GateRanks::apply(u, logits, &layout);
}

std::shared_ptr<LowRankGroup> LowRankGroup::of(nn::LinearGroup& group) {
  if (!group.delta) group.delta = std::make_shared<LowRankGroup>();
  return std::static_pointer_cast<LowRankGroup>(group.delta);
}

bool LowRankGroup::trains() const {
  return std::any_of(experts_.begin(), experts_.end(), [](const auto& e) {
    return e->a.requires_grad() || (e->router.defined() && e->router.weight.requires_grad());
  });
}

int64_t LowRankGroup::saved_per_row() const {
  int64_t numbers = 0;  // x A^T with the logits, gated ranks, routing weights
  for (const auto& e : experts_) numbers += 2 * e->width() + (e->router.defined() ? 2 * e->experts : 0);
  return numbers;
}

void LowRankGroup::add(std::shared_ptr<LowRankExperts> experts, bool trainable) {
  experts->b.set_requires_grad(trainable);
  experts->a.set_requires_grad(trainable);
  if (experts->router.defined()) experts->router.weight.set_requires_grad(trainable);
  experts_.push_back(std::move(experts));
  fuse();
}

void LowRankGroup::remove(const std::shared_ptr<LowRankExperts>& experts, nn::LinearGroup& group) {
  std::erase(experts_, experts);
  if (experts_.empty()) {
    group.delta.reset();
  } else {
    fuse();
  }
}

std::vector<torch::Tensor> LowRankGroup::fused_leaves() const {
  std::vector<torch::Tensor> leaves;
  for (const auto& e : experts_) leaves.push_back(e->a);
  for (const auto& e : experts_) {
    if (e->router.defined() && e->router.options.plain()) leaves.push_back(e->router.weight);
  }
  return leaves;
}

bool LowRankGroup::is_fused() const {
  const auto* expected = static_cast<const char*>(down_.const_data_ptr());
  for (const torch::Tensor& leaf : fused_leaves()) {
    if (leaf.const_data_ptr() != expected) return false;
    expected += leaf.nbytes();
  }
  return true;
}

void LowRankGroup::fuse() {
  torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> leaves = fused_leaves(), rows;
  const int64_t in = experts_.front()->a.size(2);
  for (const torch::Tensor& leaf : leaves) rows.push_back(leaf.detach().reshape({-1, in}));
  down_ = torch::cat(rows, 0);
  int64_t row = 0;
  for (torch::Tensor& leaf : leaves) {
    const int64_t count = leaf.numel() / in;
    leaf.set_data(down_.narrow(0, row, count).view(leaf.sizes()));
    row += count;
  }
}

torch::Tensor LowRankGroup::gate(const torch::Tensor& x, const torch::Tensor& u, const torch::Tensor& logits,
                                 nn::Pass& pass) const {
  bool routed = false, weighed = false, plain = true;
  for (const auto& e : experts_) {
    routed |= e->experts > 1;
    weighed |= pass.mixture.defined() && e->column >= 0;
    plain &= !e->router.defined() || e->router.options.plain();
  }
  if (!routed && !weighed) return u;
  if (plain && !weighed && pass.routing == nullptr && u.device().is_cpu() &&
      (u.scalar_type() == torch::kFloat32 || u.scalar_type() == torch::kBFloat16)) {
    std::vector<int64_t> experts, ranks;
    std::vector<double> temperatures;
    for (const auto& e : experts_) {
      experts.push_back(e->experts);
      ranks.push_back(e->rank);
      temperatures.push_back(e->router.options.temperature);
    }
    return gate_ranks(u, logits, experts, ranks, temperatures);
  }
  std::vector<torch::Tensor> gated;
  int64_t k = 0, l = 0;
  for (const auto& e : experts_) {
    torch::Tensor u_e = u.narrow(1, k, e->width());
    k += e->width();
    if (e->router.defined()) {
      const RouterOptions& options = e->router.options;
      torch::Tensor weights;
      if (options.plain()) {
        weights = e->router.route(logits.narrow(1, l, e->experts) / options.temperature, pass, 1);
        l += e->experts;
      } else if (options.input == RouterInput::kToken || options.input == RouterInput::kFfnProduct) {
        weights = e->router.route(e->router.logits(x, pass), pass, 1);
      } else {
        weights = e->router.route_from_pass(pass);
      }
      u_e = (u_e.view({-1, e->experts, e->rank}) * weights.to(u.scalar_type()).unsqueeze(-1)).flatten(1);
    }
    if (const torch::Tensor w = pass.adapter_weight(e->column); w.defined()) u_e = u_e * w.to(u.scalar_type());
    gated.push_back(u_e);
  }
  return torch::cat(gated, 1);
}

namespace {

/// What a row needs to know of the experts at one linear.
struct MixedExperts {
  const LowRankExperts* experts;
  int64_t target;         // first column of their linear
  const float* a;         // [E r, in]
  const float* b;         // [E r, out]
  const float* router;    // [E, in] of a plain router, else null
  torch::Tensor weights;  // [N, E] of another router
};

/// u[e, :] *= softmax(logits / temperature)[e].
void gate_row(float* u, float* logits, int64_t experts, int64_t rank, double temperature) {
  const float inverse = static_cast<float>(1.0 / temperature), top = *std::max_element(logits, logits + experts);
  float sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += logits[e] = std::exp((logits[e] - top) * inverse);
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < rank; ++i) u[e * rank + i] *= logits[e] / sum;
  }
}

/// y[begin, end) += what `mixed` adds there, times `weight`. x: [N, in]; y: [N, O]; both float32.
void add_experts(const torch::Tensor& x, const MixedExperts& mixed, float weight, int64_t begin, int64_t end,
                 torch::Tensor& y) {
  const LowRankExperts& own = *mixed.experts;
  const int64_t in = x.size(1), width = own.width(), count = end - begin, out = own.b.size(1);
  const float* rows = x.data_ptr<float>() + begin * x.stride(0);
  std::vector<float> u(count * width), logits;
  nn::kernels().thin_dots(rows, x.stride(0), mixed.a, width, in, 1.0f, u.data(), width, 0, count);
  if (mixed.router != nullptr) {
    logits.resize(count * own.experts);
    nn::kernels().thin_dots(rows, x.stride(0), mixed.router, own.experts, in, 1.0f, logits.data(), own.experts, 0,
                            count);
  }
  for (int64_t n = 0; n < count; ++n) {
    float* ranks = u.data() + n * width;
    if (mixed.router != nullptr) {
      gate_row(ranks, logits.data() + n * own.experts, own.experts, own.rank, own.router.options.temperature);
    } else if (mixed.weights.defined()) {
      const float* of_row = mixed.weights.data_ptr<float>() + (begin + n) * own.experts;
      for (int64_t i = 0; i < width; ++i) ranks[i] *= of_row[i / own.rank];
    }
    for (int64_t i = 0; weight != 1 && i < width; ++i) ranks[i] *= weight;
  }
  nn::kernels().thin_add(u.data(), width, mixed.b, width, out, static_cast<float>(own.scale),
                         y.data_ptr<float>() + begin * y.stride(0) + mixed.target, y.stride(0), 0, count);
}

}  // namespace

torch::Tensor LowRankGroup::forward_mixed(const torch::Tensor& x, const nn::LinearGroup& group, nn::Pass& pass) const {
  constexpr int64_t kRowGrain = 4;
  torch::Tensor y = group.base(x, pass);
  const torch::Tensor input = x.to(torch::kFloat32).contiguous();
  const bool narrow = y.scalar_type() != torch::kFloat32;
  torch::Tensor sum = narrow ? torch::zeros(y.sizes(), torch::kFloat32) : y;
  const std::vector<nn::MixtureRun> runs = pass.mixture_runs();
  auto weight_of = [](const LowRankExperts& e, const nn::MixtureRun& run) {
    return e.column < 0 ? 1.0f : run.weights[e.column];
  };
  std::vector<MixedExperts> used;
  for (const auto& e : experts_) {
    if (std::all_of(runs.begin(), runs.end(), [&](const auto& run) { return weight_of(*e, run) == 0; })) continue;
    MixedExperts mixed{e.get(), group.column(e->index), e->a.data_ptr<float>(), e->b.data_ptr<float>(), nullptr, {}};
    if (e->router.defined() && e->router.options.plain()) {
      mixed.router = e->router.weight.data_ptr<float>();
    } else if (e->router.defined()) {
      const bool own_input =
          e->router.options.input == RouterInput::kToken || e->router.options.input == RouterInput::kFfnProduct;
      mixed.weights = own_input ? e->router.route(e->router.logits(x, pass), pass, 1) : e->router.route_from_pass(pass);
      mixed.weights = mixed.weights.contiguous();
    }
    used.push_back(std::move(mixed));
  }
  if (used.empty()) return y;
  at::parallel_for(0, x.size(0), kRowGrain, [&](int64_t first, int64_t last) {
    for (const nn::MixtureRun& run : runs) {
      const int64_t begin = std::max(first, run.begin), end = std::min(last, run.end);
      for (const MixedExperts& mixed : used) {
        const float weight = weight_of(*mixed.experts, run);
        if (begin < end && weight != 0) add_experts(input, mixed, weight, begin, end, sum);
      }
    }
  });
  return narrow ? y.add_(sum) : y;
}

torch::Tensor LowRankGroup::forward(const torch::Tensor& x, const nn::LinearGroup& group, nn::Pass& pass) {
  const bool learns = torch::GradMode::is_enabled() && (x.requires_grad() || trains());
  if (pass.mixture.defined() && pass.routing == nullptr && !learns && !pass.training && x.is_cpu()) {
    return forward_mixed(x, group, pass);
  }
  if (!is_fused()) fuse();
  bool dropout = false, pairs_train = false, routers_train = false;
  std::vector<torch::Tensor> leaves, bs;
  std::vector<int64_t> columns;
  std::vector<double> scales;
  JointWeights joint{nullptr, {}, down_, 0, {}, 0};
  for (const auto& e : experts_) {
    dropout |= pass.training && e->dropout > 0;
    pairs_train |= e->a.requires_grad();
    leaves.push_back(e->a.view({e->width(), -1}));
    joint.rank_rows += e->width();
    bs.push_back(e->b);
    columns.push_back(group.column(e->index));
    scales.push_back(e->scale);
    MOESAIC_ASSERT(e->a.size(-1) == x.size(1) && e->b.size(0) == e->width());
  }
  for (const auto& e : experts_) {
    if (!e->router.defined() || !e->router.options.plain()) continue;
    leaves.push_back(e->router.weight);
    routers_train |= e->router.weight.requires_grad();
  }
  joint.first_trained = pairs_train ? 0 : routers_train ? joint.rank_rows : down_.size(0);
  for (const torch::Tensor& leaf : leaves) joint.leaf_rows.push_back(leaf.size(0));

  torch::Tensor y, u, logits;
  if (dropout || group.scaled()) y = group.base(x, pass);
  if (dropout) {
    std::vector<torch::Tensor> us, ls;
    for (const auto& e : experts_) {
      const torch::Tensor input = nn::drop(x, e->dropout, pass);
      us.push_back(at::linear(input.to(e->a.scalar_type()), e->a.view({e->width(), -1})).to(x.scalar_type()));
      if (e->router.defined() && e->router.options.plain()) {
        ls.push_back(at::linear(x.to(e->router.weight.scalar_type()), e->router.weight));
      }
    }
    u = torch::cat(us, 1);
    logits = ls.empty() ? torch::empty({x.size(0), 0}, down_.options()) : torch::cat(ls, 1);
  } else {
    if (!y.defined()) {
      joint.matrix = group.matrix();
      joint.bias = group.bias();
    }
    const variable_list joined =
        JointLinear::apply(x, static_cast<const JointWeights*>(&joint), at::TensorList(leaves));
    u = joined[0];
    logits = joined[1];
    if (!y.defined()) y = joined[2];
  }
  return AddUp::apply(y, gate(x, u, logits, pass), columns, scales, at::TensorList(bs));
}

}  // namespace moesaic::moe
