#include "moesaic/adapters/scale_adapter.h"

#include "moesaic/adapters/router_setup.h"
#include "moesaic/base/check.h"
#include "moesaic/moe/scale.h"

namespace moesaic::adapters {
namespace {

bool is_key(const std::string& path) { return path.ends_with("k_proj"); }

class VectorAdapter : public Adapter {
 public:
  VectorAdapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed, bool trainable,
                double effect) {
    config_ = std::move(config);
    if (config_.k_site == "auto") {
      config_.k_site = config_.method == "mov" && sites.has_qk_norm ? "post_qk_norm" : "output";
    }
    MOESAIC_CHECK(config_.k_site == "output" || sites.has_qk_norm, UsageError,
                  "k_site: got post_qk_norm, expected output: this model ({}) has no query/key norm", sites.model_type);
    check_layer_experts(config_, sites);
    const std::vector<Place> places = usable_places(sites);
    std::vector<std::string> paths;
    for (const Place& place : places) paths.push_back(place.name);
    matches_ = count_matches(config_.targets, paths);
    for (const std::string& name : config_.feedforward) {
      const bool used = std::any_of(places.begin(), places.end(), [&](const Place& place) {
        return is_target(config_, place.name, place.layer) &&
               matches_target(std::vector<std::string>{name}, place.name);
      });
      MOESAIC_CHECK(used, UsageError, "feedforward_modules: got '{}', expected some of the targets", name);
    }
    const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(device);
    for (const Place& place : places) {
      if (!is_target(config_, place.name, place.layer)) continue;
      const int64_t e = config_.experts_at(place.layer);
      const bool per_head = place.heads > 0 && config_.router.head_wise;
      const int64_t width = per_head ? place.width : std::max<int64_t>(1, place.heads) * place.width;
      torch::Tensor vectors =
          per_head ? torch::ones({e, place.heads, width}, options) : torch::ones({e, width}, options);
      moe::Router router = make_router(config_, place.name, place.layer, width, place.hidden, device, seed);
      vectors.set_requires_grad(trainable);
      if (router.defined()) router.weight.set_requires_grad(trainable);
      auto experts = std::make_shared<moe::ScaleExperts>(vectors, router, effect);
      if (place.slot != nullptr) {
        place.slot->adapters.push_back(experts);
      } else {
        moe::InputScales::of(*place.group)->add(place.index, experts);
      }
      attached_.push_back({place, experts});
    }
  }

  ~VectorAdapter() override {
    for (Attached& a : attached_) {
      if (a.place.slot != nullptr) {
        std::erase(a.place.slot->adapters, std::static_pointer_cast<nn::ScaleAdapter>(a.experts));
      } else {
        moe::InputScales::of(*a.place.group)->remove(a.experts, *a.place.group);
      }
    }
  }

  std::vector<AdapterParameter> parameters() override {
    std::vector<AdapterParameter> result;
    for (const Attached& a : attached_) {
      result.push_back({a.place.name + (mixture() ? ".mov" : ".ia3_l"), a.experts->vectors, false});
      if (a.experts->router.defined()) result.push_back({a.place.name + ".router", a.experts->router.weight, true});
    }
    return result;
  }

 private:
  /// Where a linear may be scaled: a slot of the model, or its input.
  struct Place {
    std::string name;
    int64_t layer, heads, width, hidden;  // as nn::ScaleSite
    bool input;                           // scales what the linear reads
    nn::ScaleSlot* slot;                  // nullptr: the input of member `index` of `group`
    nn::LinearGroup* group;
    int64_t index;
  };

  struct Attached {
    Place place;
    std::shared_ptr<moe::ScaleExperts> experts;
  };

  bool mixture() const { return config_.method == "mov"; }

  /// One place per linear: for feedforward targets its input (of down_proj the FFN branch, which is the same for a
  /// fixed vector), else the output, or for keys the point behind the per-head norm when the config says so.
  std::vector<Place> usable_places(const nn::Sites& sites) const {
    std::vector<Place> places;
    std::set<std::string> branches;
    for (const nn::ScaleSite& site : sites.scales) {
      const bool branch = site.kind == nn::ScaleKind::kFfn;
      if (branch) branches.insert(site.name);
      if (matches_target(config_.feedforward, site.name) != branch) continue;
      const bool behind_norm = is_key(site.name) && config_.k_site == "post_qk_norm";
      if (!branch && (site.kind == nn::ScaleKind::kPostHeadNorm) != behind_norm) continue;
      places.push_back({site.name, site.layer, site.heads, site.width, site.hidden, branch, site.slot, nullptr, 0});
    }
    const int64_t hidden = sites.linears.front().in;
    for (const nn::LinearSite& site : sites.linears) {
      if (!matches_target(config_.feedforward, site.name) || branches.contains(site.name)) continue;
      places.push_back({site.name, site.layer, 0, site.in, hidden, true, nullptr, site.group, site.index});
    }
    std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.layer < b.layer; });
    return places;
  }

  /// ia3: ia3_l [out, 1], or [1, in] at a feedforward module; mov: mov.weight [E, H, k], or [E, width] at flat places
  /// and without head_wise, router [E, d_u].
  std::vector<FileTensor> file_tensors() const override {
    std::vector<FileTensor> result;
    for (const Attached& a : attached_) {
      const torch::Tensor v = a.experts->vectors;
      std::vector<int64_t> shape = v.sizes().vec();
      if (!mixture()) {
        shape = a.place.input ? std::vector<int64_t>{1, v.numel()} : std::vector<int64_t>{v.numel(), 1};
      }
      auto to_file = [shape](const torch::Tensor& t) { return t.detach().reshape(shape).cpu().contiguous(); };
      result.push_back({a.place.name + (mixture() ? ".mov.weight" : ".ia3_l"), shape,
                        [v](const torch::Tensor& t) { torch::Tensor(v).copy_(t.view(v.sizes())); },
                        [v, to_file] { return to_file(v); }, [v, to_file] { return to_file(gradient_or_zeros(v)); }});
      if (a.experts->router.defined()) result.push_back(router_file_tensor(a.place.name, a.experts->router.weight));
    }
    return result;
  }

  std::vector<Attached> attached_;
};

}  // namespace

std::unique_ptr<Adapter> make_scale_adapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                            uint64_t seed, bool trainable, double effect) {
  return std::make_unique<VectorAdapter>(std::move(config), sites, device, seed, trainable, effect);
}

}  // namespace moesaic::adapters
