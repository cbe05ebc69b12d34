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
    std::vector<const nn::ScaleSite*> usable;
    std::vector<std::string> paths;
    for (const nn::ScaleSite& site : sites.scales) {
      if (usable_kind(site)) {
        usable.push_back(&site);
        paths.push_back(site.name);
      }
    }
    matches_ = count_matches(config_.targets, paths);
    const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(device);
    const int64_t e = config_.num_experts;
    for (const nn::ScaleSite* site : usable) {
      if (!is_target(config_, site->name, site->layer)) continue;
      const bool heads = site->heads > 0;
      torch::Tensor vectors =
          heads ? torch::ones({e, site->heads, site->width}, options) : torch::ones({e, site->width}, options);
      moe::Router router = make_router(config_, site->name, site->layer, site->width, site->hidden, device, seed);
      vectors.set_requires_grad(trainable);
      if (router.defined()) router.weight.set_requires_grad(trainable);
      auto experts = std::make_shared<moe::ScaleExperts>(vectors, router, effect);
      site->slot->adapters.push_back(experts);
      attached_.push_back({*site, experts});
    }
  }

  ~VectorAdapter() override {
    for (Attached& a : attached_)
      std::erase(a.site.slot->adapters, std::static_pointer_cast<nn::ScaleAdapter>(a.experts));
  }

  std::vector<AdapterParameter> parameters() override {
    std::vector<AdapterParameter> result;
    for (const Attached& a : attached_) {
      result.push_back({a.site.name + (mixture() ? ".mov" : ".ia3_l"), a.experts->vectors, false});
      if (a.experts->router.defined()) result.push_back({a.site.name + ".router", a.experts->router.weight, true});
    }
    return result;
  }

  formats::TensorMap gradients() const override {
    formats::TensorMap result;
    for (const FileTensor& tensor : file_tensors()) result[tensor.key] = tensor.gradient();
    return result;
  }

  formats::AdapterFolder folder() const override {
    formats::AdapterFolder result{adapter_config_json(config_), {}};
    for (const FileTensor& tensor : file_tensors()) result.tensors[tensor.key] = tensor.value();
    return result;
  }

  void load_tensors(const formats::TensorMap& tensors) override { claim_tensors(file_tensors(), tensors); }

  std::vector<std::pair<std::string, int64_t>> matches() const override { return matches_; }

 private:
  struct Attached {
    nn::ScaleSite site;
    std::shared_ptr<moe::ScaleExperts> experts;
  };

  bool mixture() const { return config_.method == "mov"; }

  /// One of the kinds at a module is meant: the FFN branch for feedforward targets, else the output, or for keys the
  /// point behind the per-head norm when the config says so.
  bool usable_kind(const nn::ScaleSite& site) const {
    const bool feedforward = matches_target(config_.feedforward, site.name);
    if (site.kind == nn::ScaleKind::kFfn) return feedforward;
    if (feedforward) return false;
    const bool behind_norm = is_key(site.name) && config_.k_site == "post_qk_norm";
    return (site.kind == nn::ScaleKind::kPostHeadNorm) == behind_norm;
  }

  /// ia3: ia3_l [out, 1], or [1, in] at a feedforward module; mov: mov.weight [E, H, k] or [E, f], router [E, d_u].
  std::vector<FileTensor> file_tensors() const {
    std::vector<FileTensor> result;
    for (const Attached& a : attached_) {
      const torch::Tensor v = a.experts->vectors;
      std::vector<int64_t> shape = v.sizes().vec();
      if (!mixture()) {
        shape = a.site.kind == nn::ScaleKind::kFfn ? std::vector<int64_t>{1, v.numel()}
                                                   : std::vector<int64_t>{v.numel(), 1};
      }
      auto to_file = [shape](const torch::Tensor& t) { return t.detach().reshape(shape).cpu().contiguous(); };
      result.push_back({a.site.name + (mixture() ? ".mov.weight" : ".ia3_l"), shape,
                        [v](const torch::Tensor& t) { torch::Tensor(v).copy_(t.view(v.sizes())); },
                        [v, to_file] { return to_file(v); }, [v, to_file] { return to_file(gradient_or_zeros(v)); }});
      if (a.experts->router.defined()) result.push_back(router_file_tensor(a.site.name, a.experts->router.weight));
    }
    return result;
  }

  std::vector<Attached> attached_;
  std::vector<std::pair<std::string, int64_t>> matches_;
};

}  // namespace

std::unique_ptr<Adapter> make_scale_adapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                            uint64_t seed, bool trainable, double effect) {
  return std::make_unique<VectorAdapter>(std::move(config), sites, device, seed, trainable, effect);
}

}  // namespace moesaic::adapters
