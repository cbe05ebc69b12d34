// The methods, and what every one of them shares.
#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/low_rank_adapter.h"
#include "moesaic/adapters/scale_adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/formats/claim.h"

namespace moesaic::adapters {
namespace {

const Method* const kMethods[] = {&kLora, &kIa3, &kMov, &kMoLora};

std::string linear_of(const std::string& tensor) {
  for (const char* suffix : {".lora_A.weight", ".lora_B.weight", ".ia3_l", ".mov.weight"}) {
    if (tensor.ends_with(suffix)) return tensor.substr(0, tensor.size() - std::string_view(suffix).size());
  }
  return "";
}

}  // namespace

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const Method* method : kMethods) names.emplace_back(method->name);
  return names;
}

const Method& method_of(const std::string& name) {
  for (const Method* method : kMethods) {
    if (name == method->name) return *method;
  }
  throw UsageError(fmt::format("finetuning_type: got '{}', expected {}", name, fmt::join(method_names(), ", ")));
}

const Method& method_of_peft_type(const std::string& peft_type, const std::string& where) {
  std::vector<std::string> known;
  for (const Method* method : kMethods) {
    if (peft_type == method->peft_type) return *method;
    known.emplace_back(method->peft_type);
  }
  throw ConfigError(fmt::format("{}: peft_type: got '{}', expected {}", where, peft_type, fmt::join(known, ", ")));
}

AdapterConfig resolve_targets(AdapterConfig config, const std::string& preset, const nn::Sites& sites) {
  const Method& method = method_of(config.method);
  MOESAIC_CHECK(preset == "reference" || preset == "all-linear" || preset.empty(), UsageError,
                "lora_target: got '{}', expected reference, all-linear or a list of modules", preset);
  std::vector<std::string> targets;
  for (const nn::Role role : preset == "reference" ? method.reference : method.all_linear) {
    for (const nn::LinearSite& site : sites.linears) {
      const std::string name = site.name.substr(site.name.rfind('.') + 1);
      if (site.role != role || std::find(targets.begin(), targets.end(), name) != targets.end()) continue;
      targets.push_back(name);
      if (!method.low_rank && role == nn::Role::kDown) config.feedforward.push_back(name);
    }
  }
  config.targets = std::move(targets);
  return config;
}

void fold(const formats::AdapterFolder& adapter, const std::string& where, formats::TensorMap& model) {
  torch::NoGradGuard no_grad;
  const AdapterConfig config = parse_adapter_config(adapter.config, where + "/adapter_config.json");
  MOESAIC_CHECK(
      config.num_experts == 1, UsageError,
      "{}: {} with {} experts can't be merged: its router mixes the experts anew for every token, so no single "
      "weight equals it\nhint: use it with --adapter, or `moesaic export --format peft` for its experts one "
      "by one",
      where, config.method, config.num_experts);
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm and can't be folded into a linear", where);
  formats::TensorMap left = adapter.tensors;
  std::set<std::string> sites;
  for (const auto& [name, tensor] : adapter.tensors) {
    if (const std::string site = linear_of(name); !site.empty()) sites.insert(site);
  }
  formats::Misfits found;
  for (const std::string& site : sites) {
    const auto weight = model.find(site + ".weight"), bias = model.find(site + ".bias");
    if (weight == model.end() || weight->second.dim() != 2) {
      found.missing.push_back(fmt::format("{}.weight, a matrix of the model", site));
      std::erase_if(left, [&](const auto& item) { return linear_of(item.first) == site; });
      continue;
    }
    FoldedLinear linear{weight->second.to(torch::kFloat32), {}};
    if (bias != model.end()) linear.bias = bias->second.to(torch::kFloat32);
    try {
      method_of(config.method).fold(config, site, left, linear);
    } catch (const DataError& error) {
      found.wrong.emplace_back(error.what());
      continue;
    }
    weight->second = linear.weight;
    if (bias != model.end()) bias->second = linear.bias;
  }
  for (const auto& [name, tensor] : left) found.unexpected.push_back(name);
  formats::check_fits(found, where, "the model", "wrong base model?");
}

void Adapter::set_trainable(bool on) {
  for (const nn::Parameter& parameter : parameters()) torch::Tensor(parameter.tensor).set_requires_grad(on);
}

nn::Needs Adapter::needs() const {
  using Sentence = nn::Needs::Sentence;
  nn::Needs needs;
  needs.routed = config_.num_experts > 1;
  if (!needs.routed || config_.router.input != "sentence") return needs;
  needs.sentence = config_.router.sentence_source == "hidden" ? Sentence::kHidden : Sentence::kColumn;
  needs.sentence_width = config_.router.sentence_dim > 0 ? config_.router.sentence_dim : hidden_width_;
  return needs;
}

formats::TensorMap Adapter::gradients() const {
  formats::TensorMap result;
  for (const FileTensor& tensor : file_tensors()) result[tensor.key] = tensor.gradient();
  return result;
}

formats::AdapterFolder Adapter::folder() const {
  formats::AdapterFolder result{adapter_config_json(config_), {}};
  for (const FileTensor& tensor : file_tensors()) result.tensors[tensor.key] = tensor.value();
  return result;
}

std::shared_ptr<Adapter> Adapter::create(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                         uint64_t seed) {
  validate(config, "adapter");
  const Method& method = method_of(config.method);
  auto adapter = method.make(std::move(config), sites, device, seed, /*trainable=*/true, /*effect=*/1.0);
  adapter->hidden_width_ = sites.linears.front().in;
  return adapter;
}

std::shared_ptr<Adapter> Adapter::open(const std::filesystem::path& dir, nn::Sites& sites, const torch::Device& device,
                                       const std::string& base_fingerprint, double scale) {
  const formats::AdapterFolder folder = formats::read_adapter_folder(dir);
  const std::string where = (dir / "adapter_config.json").string();
  AdapterConfig config = parse_adapter_config(folder.config, where);
  // PEFT's own keys travel with the adapter.
  for (const auto& [key, value] : folder.config.items()) {
    if (key == "task_type" || key == "revision" || key == "auto_mapping" || key == "peft_version") {
      config.extra[key] = value;
    }
  }
  if (!config.base_fingerprint.empty() && !base_fingerprint.empty() && config.base_fingerprint != base_fingerprint) {
    spdlog::warn("{}: the adapter was trained on other base weights (its base: {}, this one: {}). Results may differ.",
                 where, config.base_fingerprint.substr(0, 19), base_fingerprint.substr(0, 19));
  }
  try {
    const Method& method = method_of(config.method);
    auto adapter = method.make(std::move(config), sites, device, /*seed=*/0, /*trainable=*/false, scale);
    adapter->hidden_width_ = sites.linears.front().in;
    adapter->load_tensors(folder.tensors);
    return adapter;
  } catch (const Error& error) {
    throw DataError(fmt::format("{}: {}", dir.string(), error.what()));
  }
}

}  // namespace moesaic::adapters
