#include "moesaic/adapters/replacements.h"

#include "moesaic/base/check.h"
#include "moesaic/base/text.h"

namespace moesaic::adapters {
namespace {

constexpr std::string_view kWeight = ".weight", kBias = ".bias", kBaseLayer = ".base_layer";
constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";

/// A name of PEFT's inside of a module that it has wrapped: "lm_head.base_layer.weight".
std::string unwrapped(std::string name) {
  for (const std::string_view end : {kWeight, kBias}) {
    const std::string wrapped = std::string(kBaseLayer) + std::string(end);
    if (name.ends_with(wrapped)) name.erase(name.size() - wrapped.size(), kBaseLayer.size());
  }
  return name;
}

/// Takes what PEFT writes of its wrappers, too, beside a resized embedding that modules_to_save names: the module it
/// stands for is in the file under its own name. Returns the embedding that was wrapped, which a tied head still is.
torch::Tensor drop_wrapped(formats::TensorMap& tensors) {
  torch::Tensor original;
  for (const char* module : kWholeModules) {
    const std::string name(module);
    if (!tensors.contains(name + ".weight")) continue;
    tensors.erase(name + ".modules_to_save.weight");
    auto wrapped = tensors.extract(name + ".original_module.weight");
    if (!wrapped.empty() && name == kWholeModules[0]) original = wrapped.mapped();
  }
  return original;
}

std::vector<int64_t> shape_in(const formats::Declarations& base, const std::string& name, bool tied) {
  const auto found = base.find(name == kHead && tied ? kEmbedding : name);
  return found == base.end() ? std::vector<int64_t>{} : found->second.shape;
}

bool fits(const torch::Tensor& weight, const std::string& name, const std::vector<int64_t>& shape) {
  const bool any_rows = (name == kEmbedding || name == kHead) && weight.dim() == 2 && weight.size(0) > 0;
  return any_rows ? weight.size(1) == shape[1] : weight.sizes() == shape;
}

/// Biases of the base that `config` says the file holds, and that it does not.
std::vector<std::string> missing_biases(const AdapterConfig& config, const formats::TensorMap& tensors,
                                        const std::vector<Replacement>& taken, const formats::Declarations& base) {
  std::vector<std::string> missing;
  if (config.bias == "none") return missing;
  for (const auto& [name, declaration] : base) {
    if (!name.ends_with(kBias)) continue;
    const std::string module = name.substr(0, name.size() - kBias.size());
    const bool wanted = config.bias == "all" || tensors.contains(module + ".lora_A.weight");
    const bool there = std::any_of(taken.begin(), taken.end(),
                                   [&](const Replacement& replacement) { return replacement.name == name; });
    if (wanted && !there) missing.push_back(fmt::format("{} (bias: {})", name, config.bias));
  }
  return missing;
}

}  // namespace

std::vector<Replacement> take_replacements(const AdapterConfig& config, formats::TensorMap& tensors, bool tied,
                                           const formats::Declarations& base) {
  std::vector<Replacement> taken;
  formats::Misfits found;
  const torch::Tensor original = drop_wrapped(tensors);
  for (auto it = tensors.begin(); it != tensors.end();) {
    const std::string name = unwrapped(it->first);
    const std::vector<int64_t> shape = shape_in(base, name, tied);
    if (shape.empty()) {
      ++it;
      continue;
    }
    if (!fits(it->second, name, shape)) {
      found.wrong.push_back(
          fmt::format("{}: got {}, expected {}", name, shape_text(it->second.sizes()), shape_text(shape)));
    }
    taken.push_back({name, it->second});
    it = tensors.erase(it);
  }
  auto is_named = [&](std::string name) {
    name.resize(name.size() - kWeight.size());
    return std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(),
                       [&](const std::string& module) { return name.ends_with(module); });
  };
  for (const std::string& module : config.modules_to_save) {
    // A module is what a path ends in, with all that is in it.
    const auto is_of = [&](const std::string& name) { return name.find(module + ".") != std::string::npos; };
    const auto has = [&](const auto& wanted) {
      return std::any_of(taken.begin(), taken.end(), [&](const Replacement& each) { return wanted(each.name); });
    };
    if (!has(is_of)) found.missing.push_back(fmt::format("modules_to_save: {}, a module of the model", module));
    for (const auto& [name, declaration] : base) {
      const bool there = has([&](const std::string& each) { return each == name; });
      if (has(is_of) && is_of(name) && !there) found.missing.push_back(fmt::format("{} (modules_to_save)", name));
    }
  }
  for (std::string& bias : missing_biases(config, tensors, taken, base)) found.missing.push_back(std::move(bias));
  formats::check_fits(found, "adapter", "the model", "wrong base model?");

  auto find = [&](const char* name) {
    return std::find_if(taken.begin(), taken.end(), [&](const Replacement& each) { return each.name == name; });
  };
  const auto embedding = find(kEmbedding), head = find(kHead);
  if (tied && (embedding == taken.end()) != (head == taken.end())) {
    const Replacement one = embedding == taken.end() ? *head : *embedding;
    if (config.ensure_weight_tying || !is_named(one.name)) {
      taken.push_back({one.name == kHead ? kEmbedding : kHead, one.weight, /*in_file=*/false});
    } else if (original.defined() && head == taken.end() && original.dim() == 2 &&
               original.size(1) == one.weight.size(1)) {
      taken.push_back({kHead, original, /*in_file=*/false});
    }
  }
  auto rows = [&](const char* name) {
    const auto own = find(name);
    if (own != taken.end()) return own->weight.size(0);
    const std::vector<int64_t> shape = shape_in(base, name, tied);
    return shape.empty() ? int64_t{-1} : shape[0];
  };
  const int64_t tokens = rows(kEmbedding), outcomes = rows(kHead);
  MOESAIC_CHECK(tokens == outcomes || tokens < 0 || outcomes < 0, DataError,
                "adapter: got {} rows of the embedding and {} of the head, expected as many: the vocabulary was "
                "resized, and the file holds only one of them\nhint: save both, with PEFT's "
                "save_pretrained(..., save_embedding_layers=True)",
                tokens, outcomes);
  return taken;
}

bool acts_whole(const std::string& tensor) {
  const std::string module = module_of(tensor);
  if (module.empty()) return !tensor.ends_with(".router.weight");
  return std::find(std::begin(kWholeModules), std::end(kWholeModules), module) != std::end(kWholeModules);
}

std::vector<std::string> acting_whole(const AdapterConfig& config, const formats::TensorMap& tensors) {
  constexpr size_t kNamed = 4;
  std::vector<std::string> found;
  if (config.use_dora) found.emplace_back("use_dora");
  for (const auto& [name, tensor] : tensors) {
    if (acts_whole(name) && found.size() < kNamed) found.push_back(name);
  }
  return found;
}

formats::TensorMap take_whole_pairs(const AdapterConfig& config, formats::TensorMap& tensors) {
  formats::TensorMap taken;
  if (config.method != "lora") return taken;
  for (auto it = tensors.begin(); it != tensors.end();) {
    const auto current = it++;
    if (module_of(current->first).empty()) continue;
    if (config.use_dora || acts_whole(current->first)) taken.insert(tensors.extract(current));
  }
  return taken;
}

formats::Misfits fold_into(formats::TensorMap& model, const AdapterConfig& config, formats::TensorMap tensors) {
  std::set<std::string> modules;
  for (const auto& [name, tensor] : tensors) {
    if (const std::string module = module_of(name); !module.empty()) modules.insert(module);
  }
  formats::Misfits found;
  for (const std::string& module : modules) {
    const auto weight = model.find(module + ".weight"), bias = model.find(module + ".bias");
    if (weight == model.end() || weight->second.dim() != 2) {
      found.missing.push_back(fmt::format("{}.weight, a matrix of the model", module));
      std::erase_if(tensors, [&](const auto& item) { return module_of(item.first) == module; });
      continue;
    }
    FoldedLinear linear{weight->second.to(torch::kFloat32), {}};
    if (bias != model.end()) linear.bias = bias->second.to(torch::kFloat32);
    try {
      method_of(config.method).fold(config, module, tensors, linear);
    } catch (const DataError& error) {
      found.wrong.emplace_back(error.what());
      continue;
    }
    weight->second = linear.weight;
    if (bias != model.end()) bias->second = linear.bias;
  }
  for (const auto& [name, tensor] : tensors) found.unexpected.push_back(name);
  return found;
}

}  // namespace moesaic::adapters
