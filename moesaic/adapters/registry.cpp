// The methods, and what every one of them shares.
#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/low_rank_adapter.h"
#include "moesaic/adapters/replacements.h"
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
  // Of encoder-decoders the sites of the published MoLoRA are the default.
  const bool reference = preset == "reference" || (preset.empty() && sites.task_type == "SEQ_2_SEQ_LM");
  std::vector<std::string> targets, feedforward;
  for (const nn::Role role : reference ? method.reference : method.all_linear) {
    for (const nn::LinearSite& site : sites.linears) {
      const std::string name = site.name.substr(site.name.rfind('.') + 1);
      if (site.role != role || std::find(targets.begin(), targets.end(), name) != targets.end()) continue;
      targets.push_back(name);
      if (!method.low_rank && role == nn::Role::kDown) feedforward.push_back(name);
    }
  }
  config.targets = std::move(targets);
  if (!method.low_rank) config.feedforward = std::move(feedforward);
  return config;
}

void fold(const formats::AdapterFolder& adapter, const std::string& where, formats::TensorMap& model) {
  torch::NoGradGuard no_grad;
  const AdapterConfig config = parse_adapter_config(adapter, where + "/adapter_config.json");
  MOESAIC_CHECK(
      config.num_experts == 1, UsageError,
      "{}: {} with {} experts can't be merged: its router mixes the experts anew for every token, so no single "
      "weight equals it\nhint: use it with --adapter, or `moesaic export --format peft` for its experts one "
      "by one",
      where, config.method, config.num_experts);
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm and can't be folded into a linear", where);
  formats::TensorMap left = adapter.tensors;
  constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";
  const bool tied = !model.contains(kHead);
  const auto replacements = take_replacements(config, left, tied, [&](const std::string& name) {
    const auto weight = model.find(name);
    return weight == model.end() ? std::vector<int64_t>{} : weight->second.sizes().vec();
  });
  const auto replaced = [&](const char* name) {
    return std::any_of(replacements.begin(), replacements.end(), [&](const Replacement& r) { return r.name == name; });
  };
  // Of a tied pair one alone leaves the other as it was.
  if (tied && replaced(kEmbedding) && !replaced(kHead)) model[kHead] = model.at(kEmbedding);
  for (const Replacement& replacement : replacements) {
    if (replacement.in_file || replacement.name != kHead) model[replacement.name] = replacement.weight;
  }
  std::set<std::string> sites;
  for (const auto& [name, tensor] : left) {
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
  needs.replaces = !replaced_.empty();
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
  formats::AdapterFolder result{adapter_config_json(config_), {}, config_.spelling};
  for (const FileTensor& tensor : file_tensors()) result.tensors[tensor.key] = tensor.value();
  for (const Replaced& replaced : replaced_) {
    if (replaced.in_file) result.tensors[replaced.name] = replaced.weight;
  }
  return result;
}

void Adapter::load_tensors(const formats::TensorMap& tensors) {
  formats::TensorMap left = tensors;
  const auto replacements = take_replacements(config_, left, tied_head_, [&](const std::string& name) {
    const auto known =
        std::find_if(replaced_.begin(), replaced_.end(), [&](const Replaced& r) { return r.name == name; });
    return known == replaced_.end() ? std::vector<int64_t>{} : known->weight.sizes().vec();
  });
  claim_tensors(file_tensors(), left);
  for (const Replacement& replacement : replacements) {
    for (Replaced& replaced : replaced_) {
      if (replaced.name == replacement.name) replaced.replace(replaced.weight = replacement.weight);
    }
  }
}

void Adapter::restore_weights() {
  for (const Replaced& replaced : replaced_) replaced.replace({});
  replaced_.clear();
}

std::shared_ptr<Adapter> Adapter::create(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                         uint64_t seed) {
  validate(config, "adapter");
  const Method& method = method_of(config.method);
  if (!config.extra.contains("task_type")) config.extra["task_type"] = sites.task_type;
  auto adapter = method.make(std::move(config), sites, device, seed, /*trainable=*/true, /*effect=*/1.0);
  adapter->hidden_width_ = sites.linears.front().in;
  return adapter;
}

std::shared_ptr<Adapter> Adapter::open(const std::filesystem::path& dir, nn::Sites& sites, const torch::Device& device,
                                       const std::string& base_fingerprint, double scale) {
  const formats::AdapterFolder folder = formats::read_adapter_folder(dir);
  const std::string where = (dir / "adapter_config.json").string();
  AdapterConfig config = parse_adapter_config(folder, where);
  if (!config.base_fingerprint.empty() && !base_fingerprint.empty() &&
      !formats::may_be_same_weights(config.base_fingerprint, base_fingerprint)) {
    spdlog::warn("{}: the adapter was trained on other base weights (its base: {}, this one: {}). Results may differ.",
                 where, config.base_fingerprint.substr(0, 19), base_fingerprint.substr(0, 19));
  }
  try {
    const Method& method = method_of(config.method);
    formats::TensorMap tensors = folder.tensors;
    const auto site_of = [&](const std::string& name) {
      return std::find_if(sites.weights.begin(), sites.weights.end(),
                          [&](const nn::WeightSite& site) { return site.name == name; });
    };
    const auto replacements = take_replacements(config, tensors, sites.tied_head, [&](const std::string& name) {
      const auto site = site_of(name);
      return site == sites.weights.end() ? std::vector<int64_t>{} : site->shape;
    });
    MOESAIC_CHECK(replacements.empty() || scale == 1.0, UsageError,
                  "got the scale {} for an adapter that replaces weights of the model, expected 1", scale);
    auto adapter = method.make(std::move(config), sites, device, /*seed=*/0, /*trainable=*/false, scale);
    adapter->hidden_width_ = sites.linears.front().in;
    adapter->tied_head_ = sites.tied_head;
    claim_tensors(adapter->file_tensors(), tensors);
    for (const auto& [name, weight, in_file] : replacements) {
      const auto site = site_of(name);
      site->replace(weight);
      adapter->replaced_.push_back({name, weight, in_file, site->replace});
    }
    return adapter;
  } catch (const Error& error) {
    throw DataError(fmt::format("{}: {}", dir.string(), error.what()));
  }
}

}  // namespace moesaic::adapters
