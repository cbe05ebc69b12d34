#include "moesaic/adapters/replacements.h"

#include "moesaic/base/check.h"
#include "moesaic/base/text.h"
#include "moesaic/formats/claim.h"

namespace moesaic::adapters {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";

bool is_replaceable(const std::string& name) {
  return name == kEmbedding || name == kHead || name.ends_with("norm.weight");
}

}  // namespace

std::vector<Replacement> take_replacements(const AdapterConfig& config, formats::TensorMap& tensors, bool tied,
                                           const std::function<std::vector<int64_t>(const std::string&)>& shape_of) {
  std::vector<Replacement> taken;
  formats::Misfits found;
  for (auto it = tensors.begin(); it != tensors.end();) {
    if (!is_replaceable(it->first)) {
      ++it;
      continue;
    }
    const std::vector<int64_t> shape = it->first == kHead && tied ? shape_of(kEmbedding) : shape_of(it->first);
    if (shape.empty()) {
      found.unexpected.push_back(it->first);
    } else if (it->second.sizes() != shape) {
      found.wrong.push_back(fmt::format("{}: got {}, expected {}{}", it->first, shape_text(it->second.sizes()),
                                        shape_text(shape),
                                        shape.size() == 2 ? " (a resized vocabulary: merge it with PEFT)" : ""));
    }
    taken.push_back({it->first, it->second});
    it = tensors.erase(it);
  }
  auto is_named = [&](std::string name) {
    name.resize(name.size() - kWeight.size());
    return std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(),
                       [&](const std::string& module) { return name.ends_with(module); });
  };
  for (const std::string& module : config.modules_to_save) {
    const bool there = std::any_of(taken.begin(), taken.end(), [&](const Replacement& replacement) {
      return replacement.name.ends_with(module + std::string(kWeight));
    });
    if (!there) found.missing.push_back(fmt::format("modules_to_save: {}, an embedding, head or norm", module));
  }
  formats::check_fits(found, "adapter", "the model", "wrong base model?");

  auto find = [&](const char* name) {
    return std::find_if(taken.begin(), taken.end(), [&](const Replacement& each) { return each.name == name; });
  };
  const auto embedding = find(kEmbedding), head = find(kHead);
  if (tied && (embedding == taken.end()) != (head == taken.end())) {
    const Replacement one = embedding == taken.end() ? *head : *embedding;
    if (config.ensure_weight_tying || !is_named(one.name)) {
      taken.push_back({one.name == kHead ? kEmbedding : kHead, one.weight, /*in_file=*/false});
    }
  }
  return taken;
}

}  // namespace moesaic::adapters
