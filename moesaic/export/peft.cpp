#include "moesaic/export/peft.h"

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/formats/config.h"
#include "moesaic/formats/tokenizer_files.h"

namespace moesaic::exporting {
namespace {

/// Targets by their whole paths: for an expert that not every layer has.
void name_sites(const formats::TensorMap& tensors, adapters::AdapterConfig& config) {
  std::set<std::string> sites;
  for (const auto& [name, tensor] : tensors) {
    if (const std::string site = adapters::module_of(name); !site.empty()) sites.insert(site);
  }
  std::vector<std::string> names, feedforward;
  for (const std::string& site : sites) {
    names.push_back(formats::spelled(config.spelling, site));
    if (config.scales_input(site)) feedforward.push_back(names.back());
  }
  config.targets = names;
  config.feedforward = feedforward;
  config.exclude = std::vector<std::string>{};
}

}  // namespace

std::vector<std::filesystem::path> export_peft(const std::filesystem::path& adapter_dir,
                                               const std::filesystem::path& out) {
  const auto folder = formats::read_adapter_folder(adapter_dir);
  const auto config = adapters::parse_adapter_config(folder, (adapter_dir / "adapter_config.json").string());
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm; PEFT has no such site", adapter_dir.string());

  const adapters::Method& method = adapters::method_of(config.method);
  formats::TensorMap routers;
  for (const auto& [name, tensor] : folder.tensors) {
    if (name.ends_with(".router.weight")) routers[name] = tensor;
  }
  std::vector<std::filesystem::path> written;
  for (int64_t e = 0; e < config.num_experts; ++e) {
    written.push_back(config.num_experts == 1 ? out : out / fmt::format("expert_{}", e));
    check_new_folder(written.back(), {adapter_dir});
  }
  for (int64_t e = 0; e < config.num_experts; ++e) {
    formats::AdapterFolder expert{.config = {}, .tensors = {}, .spelling = folder.spelling};
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
    formats::write_adapter_folder(written[e], expert);
    formats::write_tokenizer_files(written[e], formats::read_tokenizer_files(adapter_dir));
  }
  if (!routers.empty()) formats::save_safetensors(out / "router.safetensors", routers);
  return written;
}

}  // namespace moesaic::exporting
