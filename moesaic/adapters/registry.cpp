// The methods, and what every one of them shares.
#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/low_rank_adapter.h"
#include "moesaic/adapters/scale_adapter.h"
#include "moesaic/base/check.h"

namespace moesaic::adapters {
namespace {

using Maker = std::unique_ptr<Adapter> (*)(AdapterConfig, nn::Sites&, const torch::Device&, uint64_t, bool, double);

constexpr std::pair<const char*, Maker> kMethods[] = {
    {"lora", make_low_rank_adapter},
    {"molora", make_low_rank_adapter},
    {"ia3", make_scale_adapter},
    {"mov", make_scale_adapter},
};

std::unique_ptr<Adapter> make(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed,
                              bool trainable, double effect) {
  for (const auto& [method, maker] : kMethods) {
    if (config.method == method) return maker(std::move(config), sites, device, seed, trainable, effect);
  }
  throw UsageError(fmt::format("finetuning_type: got '{}', expected lora, ia3, mov or molora", config.method));
}

}  // namespace

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

std::unique_ptr<Adapter> Adapter::create(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                         uint64_t seed) {
  validate(config, "adapter");
  return make(std::move(config), sites, device, seed, /*trainable=*/true, /*effect=*/1.0);
}

std::unique_ptr<Adapter> Adapter::load(const std::filesystem::path& dir, nn::Sites& sites, const torch::Device& device,
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
  std::unique_ptr<Adapter> adapter;
  try {
    adapter = make(std::move(config), sites, device, /*seed=*/0, /*trainable=*/false, scale);
    adapter->load_tensors(folder.tensors);
  } catch (const Error& error) {
    throw DataError(fmt::format("{}: {}", dir.string(), error.what()));
  }
  return adapter;
}

}  // namespace moesaic::adapters
