#include "moesaic/adapters/router_setup.h"

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"

namespace moesaic::adapters {

void check_experts(const AdapterConfig& config, const nn::Sites& sites) {
  const auto routed = std::find_if(sites.linears.begin(), sites.linears.end(), [&](const nn::LinearSite& site) {
    return site.routed && config.adapts(site.name, site.layer) && config.experts_at(site.layer) > 1;
  });
  MOESAIC_CHECK(routed == sites.linears.end(), UsageError,
                "{}: got {} experts of {} there, expected one: it is an expert itself, whose tokens are routed to it\n"
                "hint: lora_target all-linear leaves such sites out for {}; lora and ia3 take them, too",
                routed == sites.linears.end() ? "" : routed->name, config.num_experts, config.method, config.method);
  if (config.layer_experts.empty()) return;
  std::set<int64_t> layers, absent, foreign;
  for (const nn::LinearSite& site : sites.linears) {
    layers.insert(site.layer);
    if (config.adapts(site.name, site.layer) && !config.layer_experts.contains(site.layer)) {
      absent.insert(site.layer);
    }
  }
  for (const auto& [layer, experts] : config.layer_experts) {
    if (!layers.contains(layer)) foreign.insert(layer);
  }
  std::vector<std::string> wrong;
  if (!absent.empty()) wrong.push_back(fmt::format("no number for layers {}", fmt::join(absent, ", ")));
  if (!foreign.empty()) wrong.push_back(fmt::format("the model has no layers {}", fmt::join(foreign, ", ")));
  MOESAIC_CHECK(wrong.empty(), UsageError, "num_experts: got {}: {}; expected every adapted one of 0-{}",
                experts_json(config).dump(), fmt::join(wrong, "; "), *layers.rbegin());
}

moe::Router make_router(const AdapterConfig& config, const std::string& path, int64_t layer, int64_t own_width,
                        int64_t hidden, const torch::Device& device, uint64_t seed) {
  moe::Router router;
  router.site = path;
  router.layer = layer;
  const int64_t experts = config.experts_at(layer);
  if (experts == 1) return router;
  router.options.input = moe::parse_router_input(config.router.input);
  router.options.top_k = config.router.type == "top_k" ? config.router.top_k : 0;
  router.options.topk_mode = moe::parse_topk_mode(config.router.topk_mode);
  router.options.jitter = config.router.jitter;
  router.options.temperature = config.router.temperature;
  router.options.absolute = config.router.logits == "absolute";
  int64_t width = own_width;
  if (router.options.input == moe::RouterInput::kLayerInput) width = hidden;
  if (router.options.input == moe::RouterInput::kSentence) {
    width = config.router.sentence_dim > 0 ? config.router.sentence_dim : hidden;
  }
  const auto options = torch::TensorOptions().dtype(torch::kFloat32);
  router.weight = device.is_meta()
                      ? torch::empty({experts, width}, options.device(device))
                      : torch::empty({experts, width}, options)
                            .normal_(0, config.router.init_std, make_generator(derive_seed(seed, path + ".router")))
                            .to(device);
  return router;
}

FileTensor router_file_tensor(const std::string& path, const torch::Tensor& weight) {
  return {path + ".router.weight", weight.sizes().vec(),
          [weight](const torch::Tensor& t) { torch::Tensor(weight).copy_(t); },
          [weight] { return weight.detach().cpu().contiguous(); },
          [weight] { return gradient_or_zeros(weight).detach().cpu().contiguous(); }};
}

}  // namespace moesaic::adapters
