// The methods, and what every one of them shares.
#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/expert_pairs.h"
#include "moesaic/adapters/low_rank_adapter.h"
#include "moesaic/adapters/replacements.h"
#include "moesaic/adapters/scale_adapter.h"
#include "moesaic/base/check.h"
#include "moesaic/formats/claim.h"

namespace moesaic::adapters {
namespace {

const Method* const kMethods[] = {&kLora, &kIa3, &kMov, &kMoLora};

const nn::WeightSite& weight_site(const nn::Sites& sites, const std::string& name) {
  const auto site = std::find_if(sites.weights.begin(), sites.weights.end(),
                                 [&](const nn::WeightSite& each) { return each.name == name; });
  MOESAIC_CHECK(site != sites.weights.end(), DataError, "{}: got it in the adapter, but the model has none", name);
  return *site;
}

/// Throws DataError listing what the targets name and `pairs`, those that act as a whole, lack.
void check_pairs(const AdapterConfig& config, const nn::Sites& sites, const formats::TensorMap& pairs) {
  formats::Misfits found;
  auto expect = [&](const std::string& tensor) {
    if (!pairs.contains(tensor)) found.missing.push_back(tensor);
  };
  if (config.use_dora) {
    for (const nn::LinearSite& site : sites.linears) {
      if (config.adapts(site.name, site.layer)) expect(site.name + ".lora_A.weight");
    }
  }
  // One regular expression means linears: all-linear is one.
  if (config.method == "lora" && std::holds_alternative<std::vector<std::string>>(config.targets)) {
    if (config.adapts(kWholeModules[0], -1)) expect(std::string(kWholeModules[0]) + ".lora_embedding_A");
    if (config.adapts(kWholeModules[1], -1)) expect(std::string(kWholeModules[1]) + ".lora_A.weight");
  }
  formats::check_fits(found, "adapter", "its target_modules", "saved whole?");
}

/// The weight of a module of the model, float32.
torch::Tensor weight_of(const nn::Sites& sites, const std::string& name) {
  const torch::Tensor value = weight_site(sites, name).value();
  MOESAIC_CHECK(value.defined() && value.dim() == 2, UsageError,
                "{}: got int8 numbers, expected floats: the adapter acts on the weight as a whole (DoRA, or a pair of "
                "the head)\nhint: leave --quantize out, or `moesaic merge` the adapter and quantise what it writes",
                name);
  return value.detach().to(torch::kCPU, torch::kFloat32);
}

}  // namespace

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const Method* method : kMethods) names.emplace_back(method->name);
  return names;
}

std::string module_of(const std::string& tensor) {
  for (const Method* method : kMethods) {
    for (const std::string_view end : method->tensors) {
      if (tensor.ends_with(end)) return tensor.substr(0, tensor.size() - end.size());
    }
  }
  return "";
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
  // The rows of an expert are routed already.
  auto takes = [&](const nn::LinearSite& site) { return !(method.mixes && site.routed); };
  if (!std::all_of(sites.linears.begin(), sites.linears.end(), takes)) config.exclude = kRoutedSites;
  std::vector<std::string> targets, feedforward;
  for (const nn::Role role : reference ? method.reference : method.all_linear) {
    for (const nn::LinearSite& site : sites.linears) {
      const std::string name = site.name.substr(site.name.rfind('.') + 1);
      if (site.role != role || !takes(site)) continue;
      if (std::find(targets.begin(), targets.end(), name) != targets.end()) continue;
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
  AdapterConfig config = parse_adapter_config(adapter, where + "/adapter_config.json");
  MOESAIC_CHECK(
      config.num_experts == 1, UsageError,
      "{}: {} with {} experts can't be merged: its router mixes the experts anew for every token, so no single "
      "weight equals it\nhint: use it with --adapter, or `moesaic export --format peft` for its experts one "
      "by one",
      where, config.method, config.num_experts);
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm and can't be folded into a linear", where);
  formats::TensorMap left = adapter.tensors;
  std::set<std::string> modules;
  for (const auto& [name, _] : model) modules.insert(name.substr(0, name.rfind('.')));
  settle_expert_pairs(config, left, modules);
  constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";
  const bool tied = !model.contains(kHead);
  const auto replacements = take_replacements(config, left, tied, formats::declarations(model));
  const auto replaced = [&](const std::string& name) {
    return std::any_of(replacements.begin(), replacements.end(), [&](const Replacement& r) { return r.name == name; });
  };
  const auto has_pair = [&](const std::string& module) {
    return std::any_of(left.begin(), left.end(), [&](const auto& item) { return module_of(item.first) == module; });
  };
  // Of a tied pair one alone leaves the other as it was.
  if (tied && replaced(kEmbedding) && !replaced(kHead)) model[kHead] = model.at(kEmbedding);
  for (const Replacement& replacement : replacements) {
    if (replacement.in_file || replacement.name != kHead) model[replacement.name] = replacement.weight;
  }
  if (tied && (has_pair("model.embed_tokens") || has_pair("lm_head"))) model.try_emplace(kHead, model.at(kEmbedding));
  formats::check_fits(fold_into(model, config, std::move(left)), where, "the model", "wrong base model?");
}

void warn_of_other_base(const AdapterConfig& config, const std::string& base_fingerprint, const std::string& where) {
  const std::string& own = config.base_fingerprint;
  if (own.empty() || base_fingerprint.empty() || formats::may_be_same_weights(own, base_fingerprint)) return;
  spdlog::warn("{}: the adapter was trained on other base weights (its base: {}, this one: {}). Results may differ.",
               where, own.substr(0, 19), base_fingerprint.substr(0, 19));
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
  needs.sentence = config_.router.sentence_source == "hidden"   ? Sentence::kHidden
                   : config_.router.sentence_source == "column" ? Sentence::kColumn
                                                                : Sentence::kEncoder;
  needs.sentence_width = config_.router.sentence_dim > 0 ? config_.router.sentence_dim : hidden_width_;
  return needs;
}

bool Adapter::embeds() const {
  return std::any_of(replaced_.begin(), replaced_.end(),
                     [](const Replaced& replaced) { return replaced.name == "model.embed_tokens.weight"; });
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
  result.tensors.insert(whole_pairs_.begin(), whole_pairs_.end());
  return result;
}

void Adapter::load_tensors(const formats::TensorMap& tensors) {
  formats::TensorMap left = tensors;
  formats::Declarations base;
  for (const Replaced& replaced : replaced_) {
    if (replaced.weight.defined()) base[replaced.name] = {replaced.weight.sizes().vec()};
  }
  take_whole_pairs(config_, left);  // these stay as they are
  const auto replacements = take_replacements(config_, left, tied_head_, base);
  claim_tensors(file_tensors(), left);
  for (const Replacement& replacement : replacements) {
    for (Replaced& replaced : replaced_) {
      const bool other =
          replaced.name == replacement.name && replaced.weight.defined() && !replaced.weight.equal(replacement.weight);
      if (other) replaced.replace(replaced.weight = replacement.weight);
    }
  }
}

void Adapter::replace(const nn::Sites& sites, const Replacement& replacement) {
  const nn::WeightSite& site = weight_site(sites, replacement.name);
  const torch::Tensor value = site.value();
  MOESAIC_CHECK(
      site.name == "lm_head.weight" || value.dim() == std::ssize(site.shape), UsageError,
      "{}: got int8 numbers, expected floats: the adapter replaces the weight\nhint: leave --quantize out, or "
      "`moesaic merge` the adapter and quantise what it writes",
      site.name);
  site.replace(replacement.weight);
  replaced_.push_back({replacement.name, replacement.weight, replacement.in_file, site.replace});
}

void Adapter::apply_whole(const nn::Sites& sites, const formats::TensorMap& pairs) {
  std::map<std::string, formats::TensorMap> by_module;  // one float32 weight at a time
  for (const auto& [name, tensor] : pairs) by_module[module_of(name)][name] = tensor;
  formats::Misfits found;
  for (const auto& [module, own] : by_module) {
    const std::string name = module + ".weight";
    formats::TensorMap weight{{name, weight_of(sites, name)}};
    const formats::Misfits misfits = fold_into(weight, config_, own);
    found.add(misfits);
    if (!misfits.empty()) continue;
    replace(sites, {name, weight.at(name), /*in_file=*/false});
    replaced_.back().weight = torch::Tensor();  // the model has it
  }
  formats::check_fits(found, "adapter", "the model", "wrong base model?");
  whole_pairs_ = pairs;
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
  warn_of_other_base(config, base_fingerprint, where);
  try {
    const Method& method = method_of(config.method);
    formats::TensorMap tensors = folder.tensors;
    std::set<std::string> modules;
    for (const nn::LinearSite& site : sites.linears) modules.insert(site.name);
    settle_expert_pairs(config, tensors, modules);
    formats::Declarations base;
    for (const nn::WeightSite& site : sites.weights) base[site.name] = {site.shape};
    auto replacements = take_replacements(config, tensors, sites.tied_head, base);
    const formats::TensorMap pairs = take_whole_pairs(config, tensors);
    MOESAIC_CHECK((replacements.empty() && pairs.empty()) || scale == 1.0, UsageError,
                  "got the scale {} for an adapter that replaces weights of the model, expected 1", scale);
    check_pairs(config, sites, pairs);
    auto adapter = method.make(std::move(config), sites, device, /*seed=*/0, /*trainable=*/false, scale);
    adapter->hidden_width_ = sites.linears.front().in;
    adapter->tied_head_ = sites.tied_head;
    claim_tensors(adapter->file_tensors(), tensors);
    for (const Replacement& replacement : replacements) adapter->replace(sites, replacement);
    adapter->apply_whole(sites, pairs);
    return adapter;
  } catch (const Error& error) {
    throw DataError(fmt::format("{}: {}", dir.string(), error.what()));
  }
}

}  // namespace moesaic::adapters
