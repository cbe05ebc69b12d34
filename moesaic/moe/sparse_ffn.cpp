#include "moesaic/moe/sparse_ffn.h"

#include <numeric>

#include "moesaic/base/check.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/kv_cache.h"

namespace moesaic::moe {
namespace {

constexpr int64_t kNone = -1;  // in place of an expert that has no room

/// The rows that chose each expert.
struct Groups {
  torch::Tensor rows;           // [S] int64, by expert, ascending within one
  torch::Tensor slots;          // [S] int64, their places in the flattened choice [N, k]
  std::vector<int64_t> counts;  // [E]
};

/// A counting sort of the choice [N, k] by expert, kNone left out.
Groups grouped(const torch::Tensor& chosen, int64_t experts) {
  const torch::Tensor ids = chosen.cpu().contiguous();
  const int64_t k = ids.size(1), slots = ids.numel();
  const int64_t* id = ids.data_ptr<int64_t>();
  Groups groups{{}, {}, std::vector<int64_t>(experts, 0)};
  for (int64_t s = 0; s < slots; ++s) {
    if (id[s] != kNone) ++groups.counts[id[s]];
  }
  std::vector<int64_t> next(experts, 0);  // place of the expert's next row
  std::partial_sum(groups.counts.begin(), groups.counts.end() - 1, next.begin() + 1);
  const int64_t taken = next.back() + groups.counts.back();
  groups.rows = torch::empty({taken}, torch::kInt64);
  groups.slots = torch::empty({taken}, torch::kInt64);
  auto *row = groups.rows.data_ptr<int64_t>(), *slot = groups.slots.data_ptr<int64_t>();
  for (int64_t s = 0; s < slots; ++s) {
    if (id[s] == kNone) continue;
    const int64_t place = next[id[s]]++;
    row[place] = s / k;
    slot[place] = s;
  }
  groups.rows = groups.rows.to(chosen.device());
  groups.slots = groups.slots.to(chosen.device());
  return groups;
}

/// In float32 at least.
torch::Tensor wide(const torch::Tensor& x) { return x.element_size() < 4 ? x.to(torch::kFloat32) : x; }

/// What adapters read of `pass` where only its `rows` are.
nn::Pass pass_of(const nn::Pass& pass, const torch::Tensor& rows, const torch::Tensor& x) {
  nn::Pass part = pass;
  part.segments = pass.segments.index_select(0, rows);
  part.layer_input = x;
  return part;
}

/// The rows of x [N, d] that each group has, [c_e, d]. Their gradients are added into one tensor, where index_select
/// alone would make one of x's size for each.
struct Gather : torch::autograd::Function<Gather> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                                                const std::vector<torch::Tensor>* rows) {
    ctx->saved_data["rows"] = *rows;
    ctx->saved_data["shape"] = x.sizes().vec();
    torch::autograd::variable_list parts;
    for (const torch::Tensor& of_group : *rows) parts.push_back(x.index_select(0, of_group));
    return parts;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto rows = ctx->saved_data["rows"].toTensorVector();
    torch::Tensor gx = torch::zeros(ctx->saved_data["shape"].toIntVector(), grads.front().options());
    for (size_t e = 0; e < rows.size(); ++e) gx.index_add_(0, rows[e], grads[e]);
    return {gx, {}};
  }
};

}  // namespace

SparseFfnImpl::SparseFfnImpl(const SparseFfnConfig& config, int64_t layer, const torch::TensorOptions& options)
    : gate_(torch::empty({config.experts, config.hidden_size}, options), torch::Tensor()),
      router_name_(config.router),
      expert_prefix_(config.expert_prefix),
      capacity_(config.capacity),
      cache_layer_(config.cache_layer),
      jitter_(config.jitter) {
  router_.options.top_k = config.top_k;
  router_.options.topk_mode = config.renormalize ? TopkMode::kRenorm : TopkMode::kMask;
  router_.layer = layer;
  auto network = [&](int64_t width) {
    return nn::FeedForward(config.hidden_size, width, /*bias=*/false, config.activation, layer, options, config.names);
  };
  if (const size_t point = router_name_.find('.'); point != std::string::npos) {
    const auto holder = register_module(router_name_.substr(0, point), std::make_shared<torch::nn::Module>());
    holder->register_module(router_name_.substr(point + 1), gate_);
  } else {
    register_module(router_name_, gate_);
  }
  const auto experts = register_module("experts", std::make_shared<torch::nn::Module>());
  for (int64_t e = 0; e < config.experts; ++e) {
    experts_.push_back(experts->register_module(expert_prefix_ + std::to_string(e), network(config.width)));
  }
  if (config.shared_width == 0) return;
  shared_ = register_module("shared_expert", network(config.shared_width));
  if (!config.shared_gate) return;
  shared_gate_ = register_module("shared_expert_gate",
                                 nn::Linear(torch::empty({1, config.hidden_size}, options), torch::Tensor()));
}

/// `chosen` [N, 1] with kNone where an expert has had `capacity_` tokens of the text.
torch::Tensor SparseFfnImpl::within_capacity(const torch::Tensor& chosen, const nn::Pass& pass) const {
  if (capacity_ == 0) return chosen;
  MOESAIC_ASSERT(chosen.size(1) == 1);
  torch::Tensor ids = chosen.cpu().contiguous().clone();
  auto* id = ids.data_ptr<int64_t>();
  for (int64_t b = 0; b + 1 < std::ssize(pass.offsets); ++b) {
    std::vector<int32_t> own;  // of a text that comes whole
    std::vector<int32_t>& had = pass.cache != nullptr ? pass.cache->experts(cache_layer_, b) : own;
    std::vector<int64_t> counts(experts_.size(), 0);
    for (const int32_t e : had) ++counts[e];
    for (int64_t n = pass.offsets[b]; n < pass.offsets[b + 1]; ++n) {
      had.push_back(static_cast<int32_t>(id[n]));
      if (++counts[id[n]] > capacity_) id[n] = kNone;
    }
  }
  return ids;
}

torch::Tensor SparseFfnImpl::routed(const torch::Tensor& x, nn::Pass& pass) {
  Router router = router_;
  router.options.jitter = gate_->weight.requires_grad() ? jitter_ : 0.0;
  router.owner = pass.place.empty() ? "base" : pass.place;
  router.weight = wide(gate_->weight);
  const Choice choice = router.choose(router.logits(x, pass), pass);
  const Groups groups = grouped(within_capacity(choice.experts, pass), std::ssize(experts_));
  const std::vector<torch::Tensor>
      rows = groups.rows.split_with_sizes(groups.counts),
      weights = choice.weights.flatten().index_select(0, groups.slots).split_with_sizes(groups.counts);
  const bool learns = torch::GradMode::is_enabled() && x.requires_grad();
  const torch::autograd::variable_list inputs = learns ? Gather::apply(x, &rows) : torch::autograd::variable_list();
  torch::Tensor sum = torch::zeros_like(x);
  for (size_t e = 0; e < experts_.size(); ++e) {
    if (groups.counts[e] == 0) continue;
    const torch::Tensor input = learns ? inputs[e] : x.index_select(0, rows[e]);
    std::optional<nn::Pass> own;  // where adapters or dropout read it
    if (experts_[e]->adapted() || (pass.training && pass.dropout > 0)) own = pass_of(pass, rows[e], input);
    sum.index_add_(0, rows[e], experts_[e]->forward(input, own ? *own : pass, weights[e]));
  }
  return sum;
}

torch::Tensor SparseFfnImpl::forward(const torch::Tensor& x, nn::Pass& pass) {
  const torch::Tensor y = routed(x, pass);
  if (!shared_) return y;
  torch::Tensor gate;
  if (shared_gate_) gate = wide(nn::linear_rows(x, shared_gate_->weight, {}).flatten()).sigmoid();
  return y + shared_->forward(x, pass, gate);
}

void SparseFfnImpl::add_sites(const std::string& path, nn::Sites& sites) {
  router_.site = path + "." + router_name_;
  sites.routers.push_back(router_.site + ".weight");
  const size_t before = sites.linears.size();
  for (size_t e = 0; e < experts_.size(); ++e) {
    experts_[e]->add_sites(fmt::format("{}.experts.{}{}", path, expert_prefix_, e), sites);
  }
  for (size_t i = before; i < sites.linears.size(); ++i) {
    sites.linears[i].routed = true;
    sites.linears[i].share = static_cast<double>(router_.options.top_k) / static_cast<double>(experts_.size());
  }
  if (shared_) shared_->add_sites(path + ".shared_expert", sites);
}

int64_t SparseFfnImpl::saved_per_row(bool whole) const {
  const int64_t k = router_.options.top_k, experts = std::ssize(experts_);
  // Of the router the probabilities, of each chosen expert its number, weight and row besides.
  int64_t numbers = experts + k * (experts_.front()->saved_per_row(whole) + 4);
  if (shared_) numbers += shared_->saved_per_row(whole) + 1;
  return numbers;
}

void SparseFfnImpl::quantize_int8() {
  for (nn::FeedForward& expert : experts_) expert->quantize_int8();
  if (shared_) shared_->quantize_int8();
}

}  // namespace moesaic::moe
