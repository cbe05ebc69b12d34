#include "moesaic/export/peft.h"

#include "moesaic/adapters/adapter.h"

namespace moesaic::exporting {
namespace {

/// Targets by their whole paths: for an expert that not every layer has.
void name_sites(const formats::TensorMap& tensors, adapters::AdapterConfig& config) {
  std::set<std::string> sites;
  for (const auto& [name, tensor] : tensors) {
    sites.insert(name.substr(0, std::min(name.find(".lora_"), name.find(".ia3_l"))));
  }
  const auto branches = std::exchange(config.feedforward, {});
  for (const std::string& site : sites) {
    if (adapters::matches_target(branches, site)) config.feedforward.push_back(site);
  }
  config.targets = std::vector<std::string>(sites.begin(), sites.end());
  config.exclude = std::vector<std::string>{};
}

}  // namespace

std::vector<std::filesystem::path> export_peft(const std::filesystem::path& adapter_dir,
                                               const std::filesystem::path& out) {
  const auto folder = formats::read_adapter_folder(adapter_dir);
  const auto config = adapters::parse_adapter_config(folder.config, (adapter_dir / "adapter_config.json").string());
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm; PEFT has no such site", adapter_dir.string());

  const adapters::Method& method = adapters::method_of(config.method);
  formats::TensorMap routers;
  for (const auto& [name, tensor] : folder.tensors) {
    if (name.ends_with(".router.weight")) routers[name] = tensor;
  }
  std::vector<std::filesystem::path> written;
  for (int64_t e = 0; e < config.num_experts; ++e) {
    formats::AdapterFolder expert;
    for (const auto& [name, tensor] : folder.tensors) {
      if (name.ends_with(".router.weight")) continue;
      MOESAIC_CHECK(!method.mixes || tensor.dim() >= 2, DataError, "{}: got shape [{}], expected one entry per expert",
                    name, fmt::join(tensor.sizes(), ", "));
      auto [expert_name, value] = method.expert_tensor(config, name, tensor, e);
      if (value.defined()) expert.tensors[expert_name] = value;
    }
    auto single = config;
    single.method = method.expert;
    single.num_experts = 1;
    if (!config.layer_experts.empty()) name_sites(expert.tensors, single);
    expert.config = adapters::adapter_config_json(single);
    expert.config.erase("moesaic");
    written.push_back(config.num_experts == 1 ? out : out / fmt::format("expert_{}", e));
    formats::write_adapter_folder(written.back(), expert);
  }
  if (!routers.empty()) formats::save_safetensors(out / "router.safetensors", routers);
  return written;
}

}  // namespace moesaic::exporting
