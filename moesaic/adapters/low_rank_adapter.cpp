#include "moesaic/adapters/low_rank_adapter.h"

#include "moesaic/adapters/claim.h"
#include "moesaic/adapters/replacements.h"
#include "moesaic/adapters/router_setup.h"
#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/base/text.h"
#include "moesaic/formats/config.h"
#include "moesaic/moe/low_rank.h"

namespace moesaic::adapters {
namespace {

class LowRankAdapter : public Adapter {
 public:
  LowRankAdapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed, bool trainable,
                 double effect) {
    config_ = std::move(config);
    std::vector<std::string> paths;
    for (const nn::LinearSite& site : sites.linears) paths.push_back(formats::spelled(config_.spelling, site.name));
    if (!trainable) {
      for (const char* module : kWholeModules) paths.push_back(formats::spelled(config_.spelling, module));
    }
    matches_ = count_matches(config_.targets, paths);
    check_experts(config_, sites);
    const int64_t hidden = sites.linears.front().in;
    const auto options = torch::TensorOptions().dtype(torch::kFloat32);
    for (const nn::LinearSite& site : sites.linears) {
      if (config_.use_dora || !config_.adapts(site.name, site.layer)) continue;
      auto experts = std::make_shared<moe::LowRankExperts>();
      const int64_t rank = config_.rank_at(site.name);
      experts->index = site.index;
      experts->experts = config_.experts_at(site.layer);
      experts->rank = rank;
      experts->scale = effect * config_.scale_at(site.name);
      experts->dropout = config_.lora_dropout;
      const std::vector<int64_t> a_shape{experts->experts, rank, site.in};
      experts->a = device.is_meta() ? torch::empty(a_shape, options.device(device))
                                    : torch::empty(a_shape, options)
                                          .normal_(0, 0.02, make_generator(derive_seed(seed, site.name + ".lora_A")))
                                          .to(device);
      experts->b = torch::zeros({experts->width(), site.out}, options.device(device));
      experts->router = make_router(config_, site.name, site.layer, site.in, hidden, device, seed);
      moe::LowRankGroup::of(*site.group)->add(experts, trainable);
      attached_.push_back({site, experts});
    }
  }

  ~LowRankAdapter() override { detach(); }

  void detach() override {
    restore_weights();
    for (Attached& site : attached_) moe::LowRankGroup::of(*site.site.group)->remove(site.experts, *site.site.group);
    attached_.clear();
  }

  void name_as(const std::string& owner, int64_t column) override {
    owner_ = owner;
    for (Attached& site : attached_) {
      site.experts->column = column;
      site.experts->router.owner = owner;
    }
  }

  std::vector<nn::Parameter> parameters() override {
    using Kind = nn::Parameter::Kind;
    std::vector<nn::Parameter> result;
    for (const Attached& site : attached_) {
      result.push_back({site.site.name + ".lora_A", site.experts->a, Kind::kMatrix});
      result.push_back({site.site.name + ".lora_B", site.experts->b, Kind::kMatrix});
      if (site.experts->router.defined()) {
        result.push_back({site.site.name + ".router", site.experts->router.weight, Kind::kRouter});
      }
    }
    return result;
  }

 private:
  struct Attached {
    nn::LinearSite site;
    std::shared_ptr<moe::LowRankExperts> experts;
  };

  /// lora: A [r, in], B [out, r]; molora: A [E, r, in], B [E, out, r], router [E, d_u].
  std::vector<FileTensor> file_tensors() const override {
    std::vector<FileTensor> result;
    const bool stacked = method_of(config_.method).mixes;
    for (const Attached& attached : attached_) {
      const auto& e = attached.experts;
      const std::string& name = attached.site.name;
      const int64_t out = attached.site.out;
      const std::vector<int64_t> a_shape = e->a.sizes().vec();
      const std::vector<int64_t> b_shape{e->experts, out, e->rank};
      auto drop = [stacked](std::vector<int64_t> shape) {
        return stacked ? shape : std::vector<int64_t>(shape.begin() + 1, shape.end());
      };
      auto to_file_a = [shape = drop(a_shape)](const torch::Tensor& a) {
        return a.detach().reshape(shape).cpu().contiguous();
      };
      auto to_file_b = [e, shape = drop(b_shape)](const torch::Tensor& b) {
        return b.detach().view({e->experts, e->rank, -1}).transpose(1, 2).reshape(shape).cpu().contiguous();
      };
      result.push_back(
          {name + ".lora_A.weight", drop(a_shape), [e](const torch::Tensor& t) { e->a.copy_(t.view(e->a.sizes())); },
           [e, to_file_a] { return to_file_a(e->a); }, [e, to_file_a] { return to_file_a(gradient_or_zeros(e->a)); }});
      result.push_back({name + ".lora_B.weight", drop(b_shape),
                        [e, b_shape](const torch::Tensor& t) {
                          e->b.copy_(t.reshape(b_shape).transpose(1, 2).reshape(e->b.sizes()));
                        },
                        [e, to_file_b] { return to_file_b(e->b); },
                        [e, to_file_b] { return to_file_b(gradient_or_zeros(e->b)); }});
      if (e->router.defined()) result.push_back(router_file_tensor(name, e->router.weight));
    }
    return result;
  }

  std::vector<Attached> attached_;
};

std::shared_ptr<Adapter> make(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed,
                              bool trainable, double effect) {
  return std::make_shared<LowRankAdapter>(std::move(config), sites, device, seed, trainable, effect);
}

/// `tensor` without a leading axis of one expert.
torch::Tensor one_expert(const torch::Tensor& tensor) {
  return tensor.defined() && tensor.dim() == 3 && tensor.size(0) == 1 ? tensor[0] : tensor;
}

void fold_low_rank(const AdapterConfig& config, const std::string& site, formats::TensorMap& tensors,
                   FoldedLinear& linear) {
  auto take = [&](const char* suffix) {
    auto node = tensors.extract(site + suffix);
    return node.empty() ? torch::Tensor() : one_expert(node.mapped().to(torch::kFloat32));
  };
  torch::Tensor a = take(".lora_A.weight"), b = take(".lora_B.weight");
  const torch::Tensor embedding_a = take(".lora_embedding_A"), embedding_b = take(".lora_embedding_B");
  const bool embeds = embedding_a.defined() || embedding_b.defined();
  if (embeds) std::tie(a, b) = std::tie(embedding_a, embedding_b);
  const torch::Tensor magnitude = take(".lora_magnitude_vector");
  if (!a.defined() && !b.defined() && !magnitude.defined()) return;
  torch::Tensor weight = embeds ? linear.weight.t() : linear.weight;
  const int64_t out = weight.size(0), in = weight.size(1);
  const bool fits = a.defined() && b.defined() && a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) &&
                    a.size(1) == in && b.size(0) == out;
  auto shape = [](const torch::Tensor& t) { return t.defined() ? shape_text(t.sizes()) : std::string("none"); };
  MOESAIC_CHECK(fits, DataError, "{}: got lora_A {} and lora_B {}, expected [r, {}] and [{}, r]", site, shape(a),
                shape(b), in, out);
  weight = torch::addmm(weight, b, a, 1.0, config.scale_at(site));
  MOESAIC_CHECK(magnitude.defined() == config.use_dora && (!config.use_dora || magnitude.numel() == out), DataError,
                "{}: got lora_magnitude_vector {}, expected {}", site, shape(magnitude),
                config.use_dora ? fmt::format("[{}]", out) : "none: use_dora is false");
  if (config.use_dora) weight = weight * (magnitude.flatten() / weight.norm(2, 1)).unsqueeze(1);
  linear.weight = embeds ? weight.t().contiguous() : weight;
}

std::pair<std::string, torch::Tensor> expert_tensor(const AdapterConfig& config, const std::string& name,
                                                    const torch::Tensor& tensor, int64_t e) {
  if (!method_of(config.method).mixes) return {name, tensor};
  return {name, e < tensor.size(0) ? tensor[e].contiguous() : torch::Tensor()};
}

using enum nn::Role;
const std::vector<const char*> kTensors{".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector",
                                        ".lora_embedding_A", ".lora_embedding_B"};
const std::vector<nn::Role> kReference{kQuery, kKey, kValue, kAttentionOut, kGate, kDown};
const std::vector<nn::Role> kAllLinear{kQuery, kKey, kValue, kAttentionOut, kGate, kDown, kUp};

}  // namespace

const Method kLora{.name = "lora",
                   .peft_type = "LORA",
                   .summary = "one low-rank pair per linear",
                   .mixes = false,
                   .expert = "lora",
                   .low_rank = true,
                   .tensors = kTensors,
                   .reference = kReference,
                   .all_linear = kAllLinear,
                   .make = make,
                   .fold = fold_low_rank,
                   .expert_tensor = expert_tensor};
const Method kMoLora{.name = "molora",
                     .peft_type = "MOLORA",
                     .summary = "a mixture of low-rank pairs per linear",
                     .mixes = true,
                     .expert = "lora",
                     .low_rank = true,
                     .tensors = kTensors,
                     .reference = kReference,
                     .all_linear = kAllLinear,
                     .make = make,
                     .fold = fold_low_rank,
                     .expert_tensor = expert_tensor};

}  // namespace moesaic::adapters
