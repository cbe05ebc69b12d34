#include "moesaic/adapters/expert_pairs.h"

#include "moesaic/base/check.h"
#include "moesaic/formats/expert_names.h"

namespace moesaic::adapters {
namespace {

constexpr std::string_view kExperts = ".experts.";
constexpr const char *kGateUp = "experts.gate_up_proj", *kDown = "experts.down_proj";

/// "model.layers.0.block_sparse_moe.experts" of the layer of `name`, and its matrices' names; nullopt of a dense one.
struct Block {
  std::string experts;
  formats::ExpertNames names;
};
std::optional<Block> block_of(const std::string& name, const std::set<std::string>& modules) {
  const size_t layers = name.find(".layers.");
  const size_t end = layers == std::string::npos ? layers : name.find('.', layers + std::strlen(".layers."));
  if (end == std::string::npos) return std::nullopt;
  for (const char* family : {"mixtral", "qwen3_moe"}) {
    const formats::ExpertNames names = *formats::expert_names(family);
    const std::string experts = fmt::format("{}.{}.experts", name.substr(0, end), names.block);
    if (modules.contains(fmt::format("{}.0.{}", experts, names.gate_proj))) return Block{experts, names};
  }
  return std::nullopt;
}

/// One layer's pair over all experts, apart; `parts`: the matrices that share its A, one below the other in B.
void take_apart(const Block& block, const std::vector<const char*>& parts, const torch::Tensor& a,
                const torch::Tensor& b, int64_t rank, const std::string& where, formats::TensorMap& tensors) {
  const auto count = std::ssize(parts);
  const bool fits =
      a.dim() == 2 && b.dim() == 2 && a.size(0) % rank == 0 && b.size(1) == a.size(0) && b.size(0) % count == 0;
  MOESAIC_CHECK(fits, DataError, "{}: got lora_A [{}] and lora_B [{}], expected [E {}, in] and [out, E {}]", where,
                fmt::join(a.sizes(), ", "), fmt::join(b.sizes(), ", "), rank, rank);
  const int64_t experts = a.size(0) / rank;
  const torch::Tensor rows = a.view({experts, rank, -1}), columns = b.view({b.size(0), rank, experts});
  for (int64_t e = 0; e < experts; ++e) {
    const auto halves = columns.select(2, e).chunk(count);
    for (int64_t i = 0; i < count; ++i) {
      const std::string module = fmt::format("{}.{}.{}", block.experts, e, parts[i]);
      tensors[module + ".lora_A.weight"] = rows[e];
      tensors[module + ".lora_B.weight"] = halves[i].contiguous();
    }
  }
}

/// Adds targets that match what `parts` are called in every expert.
void add_targets(AdapterConfig& config, const std::set<const char*>& parts, int64_t experts) {
  if (auto* names = std::get_if<std::vector<std::string>>(&config.targets)) {
    for (int64_t e = 0; e < experts; ++e) {
      for (const char* part : parts) names->push_back(fmt::format("experts.{}.{}", e, part));
    }
    return;
  }
  config.targets =
      fmt::format(R"((?:{})|.*\.experts\.\d+\.(?:{}))", std::get<std::string>(config.targets), fmt::join(parts, "|"));
}

void unstack(AdapterConfig& config, formats::TensorMap& tensors, const std::set<std::string>& modules) {
  bool gate_up = false, down = false;
  for (const std::string& target : config.target_parameters) {
    gate_up = gate_up || target.ends_with(kGateUp);
    down = down || target.ends_with(kDown);
    MOESAIC_CHECK(target.ends_with(kGateUp) || target.ends_with(kDown), DataError,
                  "target_parameters: got '{}', expected {} or {}", target, kGateUp, kDown);
  }
  std::set<const char*> adapted;
  int64_t experts = 0;
  const std::string pair_end = ".experts.lora_A.weight", inner_end = ".experts.base_layer.lora_A.weight";
  std::vector<std::string> found;
  for (const auto& [name, _] : tensors) {
    if (name.ends_with(pair_end) || name.ends_with(inner_end)) found.push_back(name);
  }
  for (const std::string& name : found) {
    const bool inner = name.ends_with(inner_end), of_gate_up = gate_up && (inner || !down);
    std::string other = name;
    other.replace(other.rfind("lora_A"), std::strlen("lora_A"), "lora_B");
    const auto block = block_of(name, modules);
    MOESAIC_CHECK(block && tensors.contains(other), DataError, "{}: got it in the adapter, but {}", name,
                  block ? "no lora_B" : "the model has no experts there");
    const torch::Tensor a = tensors.at(name), b = tensors.at(other);
    tensors.erase(name);
    tensors.erase(other);
    const formats::ExpertNames& names = block->names;
    const auto parts = of_gate_up ? std::vector{names.gate_proj, names.up_proj} : std::vector{names.down_proj};
    take_apart(*block, parts, a, b, config.lora_rank, name, tensors);
    adapted.insert(parts.begin(), parts.end());
    experts = std::max(experts, a.size(0) / config.lora_rank);
  }
  add_targets(config, adapted, experts);
  config.target_parameters.clear();
}

}  // namespace

void settle_expert_pairs(AdapterConfig& config, formats::TensorMap& tensors, const std::set<std::string>& modules) {
  if (!config.target_parameters.empty()) unstack(config, tensors, modules);
  const bool has_exclude = std::visit([](const auto& pattern) { return !pattern.empty(); }, config.exclude);
  auto of_expert = [](const std::string& name) { return name.find(kExperts) != std::string::npos; };
  const bool here = std::any_of(modules.begin(), modules.end(), of_expert);
  const bool there =
      std::any_of(tensors.begin(), tensors.end(), [&](const auto& item) { return of_expert(item.first); });
  if (here && !there && !has_exclude) config.exclude = kRoutedSites;
}

}  // namespace moesaic::adapters
