#include "moesaic/adapters/scale_adapter.h"

#include "moesaic/adapters/router_setup.h"
#include "moesaic/base/check.h"
#include "moesaic/formats/config.h"
#include "moesaic/moe/scale.h"

namespace moesaic::adapters {
namespace {

class ScaleAdapter : public Adapter {
 public:
  ScaleAdapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed, bool trainable,
               double effect) {
    config_ = std::move(config);
    if (config_.k_site == "auto") {
      config_.k_site = mixes() && sites.has_qk_norm ? "post_qk_norm" : "output";
    }
    MOESAIC_CHECK(config_.k_site == "output" || sites.has_qk_norm, UsageError,
                  "k_site: got post_qk_norm, expected output: this model ({}) has no query/key norm", sites.model_type);
    check_experts(config_, sites);
    const std::vector<nn::ScaleSite> places = usable_places(sites);
    std::vector<std::string> paths;
    for (const nn::ScaleSite& place : places) paths.push_back(formats::spelled(config_.spelling, place.name));
    matches_ = count_matches(config_.targets, paths);
    check_feedforward(places);
    const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(device);
    for (const nn::ScaleSite& place : places) {
      if (!config_.adapts(place.name, place.layer)) continue;
      const int64_t e = config_.experts_at(place.layer);
      const bool per_head = place.heads > 0 && config_.router.head_wise;
      const int64_t width = per_head ? place.width : std::max<int64_t>(1, place.heads) * place.width;
      torch::Tensor vectors =
          per_head ? torch::ones({e, place.heads, width}, options) : torch::ones({e, width}, options);
      moe::Router router = make_router(config_, place.name, place.layer, width, place.hidden, device, seed);
      vectors.set_requires_grad(trainable);
      if (router.defined()) router.weight.set_requires_grad(trainable);
      auto experts = std::make_shared<moe::ScaleExperts>(vectors, router, effect);
      place.slot->adapters.push_back(experts);
      attached_.push_back({place, experts});
    }
  }

  ~ScaleAdapter() override { detach(); }

  void detach() override {
    restore_weights();
    for (Attached& a : attached_) {
      std::erase(a.place.slot->adapters, std::static_pointer_cast<nn::ScaleAdapter>(a.experts));
    }
    attached_.clear();
  }

  void name_as(const std::string& owner, int64_t column) override {
    owner_ = owner;
    for (Attached& a : attached_) {
      a.experts->column = column;
      a.experts->router.owner = owner;
    }
  }

  std::vector<nn::Parameter> parameters() override {
    using Kind = nn::Parameter::Kind;
    std::vector<nn::Parameter> result;
    for (const Attached& a : attached_) {
      result.push_back({a.place.name + (mixes() ? ".mov" : ".ia3_l"), a.experts->vectors, Kind::kVector});
      if (a.experts->router.defined()) {
        result.push_back({a.place.name + ".router", a.experts->router.weight, Kind::kRouter});
      }
    }
    return result;
  }

 private:
  struct Attached {
    nn::ScaleSite place;
    std::shared_ptr<moe::ScaleExperts> experts;
    bool scales_input() const { return place.kind == nn::ScaleKind::kInput || place.kind == nn::ScaleKind::kFfn; }
  };

  bool mixes() const { return method_of(config_.method).mixes; }

  /// Every name of feedforward_modules is that of a target.
  void check_feedforward(const std::vector<nn::ScaleSite>& places) const {
    const auto* names = std::get_if<std::vector<std::string>>(&config_.feedforward);
    if (names == nullptr || std::holds_alternative<std::string>(config_.targets)) return;
    for (const std::string& name : *names) {
      const bool used = std::any_of(places.begin(), places.end(), [&](const nn::ScaleSite& place) {
        return config_.adapts(place.name, place.layer) &&
               formats::spelled(config_.spelling, place.name).ends_with(name);
      });
      MOESAIC_CHECK(used, UsageError, "feedforward_modules: got '{}', expected some of the targets", name);
    }
  }

  /// One place per linear: for feedforward targets its input (of down_proj the FFN branch, which is the same for a
  /// fixed vector), else the output, or for keys the point behind the per-head norm when the config says so.
  std::vector<nn::ScaleSite> usable_places(const nn::Sites& sites) const {
    std::set<std::string> branches;
    for (const nn::ScaleSite& site : sites.scales) {
      if (site.kind == nn::ScaleKind::kFfn) branches.insert(site.name);
    }
    std::vector<nn::ScaleSite> places;
    for (const nn::ScaleSite& site : sites.scales) {
      nn::ScaleKind wanted = nn::ScaleKind::kOutput;
      if (config_.scales_input(site.name)) {
        wanted = branches.contains(site.name) ? nn::ScaleKind::kFfn : nn::ScaleKind::kInput;
      } else if (site.role == nn::Role::kKey && config_.k_site == "post_qk_norm") {
        wanted = nn::ScaleKind::kPostHeadNorm;
      }
      if (site.kind == wanted) places.push_back(site);
    }
    return places;
  }

  /// ia3: ia3_l [out, 1], or [1, in] at a feedforward module; mov: mov.weight [E, H, k], or [E, width] at flat places
  /// and without head_wise, router [E, d_u].
  std::vector<FileTensor> file_tensors() const override {
    std::vector<FileTensor> result;
    for (const Attached& a : attached_) {
      const torch::Tensor v = a.experts->vectors;
      std::vector<int64_t> shape = v.sizes().vec();
      if (!mixes()) {
        shape = a.scales_input() ? std::vector<int64_t>{1, v.numel()} : std::vector<int64_t>{v.numel(), 1};
      }
      auto to_file = [shape](const torch::Tensor& t) { return t.detach().reshape(shape).cpu().contiguous(); };
      result.push_back({a.place.name + (mixes() ? ".mov.weight" : ".ia3_l"), shape,
                        [v](const torch::Tensor& t) { torch::Tensor(v).copy_(t.view(v.sizes())); },
                        [v, to_file] { return to_file(v); }, [v, to_file] { return to_file(gradient_or_zeros(v)); }});
      if (a.experts->router.defined()) result.push_back(router_file_tensor(a.place.name, a.experts->router.weight));
    }
    return result;
  }

  std::vector<Attached> attached_;
};

std::shared_ptr<Adapter> make(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed,
                              bool trainable, double effect) {
  return std::make_shared<ScaleAdapter>(std::move(config), sites, device, seed, trainable, effect);
}

void fold_scale(const AdapterConfig& config, const std::string& site, formats::TensorMap& tensors,
                FoldedLinear& linear) {
  for (const char* suffix : {".ia3_l", ".mov.weight"}) {
    auto node = tensors.extract(site + suffix);
    if (node.empty()) continue;
    const torch::Tensor scale = node.mapped().to(torch::kFloat32).flatten();
    const bool input = config.scales_input(site);
    MOESAIC_CHECK(scale.numel() == linear.weight.size(input ? 1 : 0), DataError, "{}: got {} scales, expected {}", site,
                  scale.numel(), linear.weight.size(input ? 1 : 0));
    linear.weight = input ? linear.weight * scale : linear.weight * scale.unsqueeze(1);
    if (linear.bias.defined() && !input) linear.bias = linear.bias * scale;
  }
}

std::pair<std::string, torch::Tensor> expert_tensor(const AdapterConfig& config, const std::string& name,
                                                    const torch::Tensor& tensor, int64_t e) {
  if (!name.ends_with(".mov.weight")) return {name, tensor};
  if (e >= tensor.size(0)) return {name, {}};
  const std::string site = name.substr(0, name.size() - std::string_view(".mov.weight").size());
  const torch::Tensor vector = tensor[e].contiguous();
  return {site + ".ia3_l", config.scales_input(site) ? vector.view({1, -1}) : vector.view({-1, 1})};
}

using enum nn::Role;
const std::vector<nn::Role> kScaled{kKey, kValue, kDown};

}  // namespace

const Method kIa3{.name = "ia3",
                  .peft_type = "IA3",
                  .summary = "one vector per scaled activation",
                  .mixes = false,
                  .expert = "ia3",
                  .low_rank = false,
                  .tensors = {".ia3_l"},
                  .reference = kScaled,
                  .all_linear = kScaled,
                  .make = make,
                  .fold = fold_scale,
                  .expert_tensor = expert_tensor};
const Method kMov{.name = "mov",
                  .peft_type = "MOV",
                  .summary = "a mixture of vectors per scaled activation",
                  .mixes = true,
                  .expert = "ia3",
                  .low_rank = false,
                  .tensors = {".mov.weight"},
                  .reference = kScaled,
                  .all_linear = kScaled,
                  .make = make,
                  .fold = fold_scale,
                  .expert_tensor = expert_tensor};

}  // namespace moesaic::adapters
