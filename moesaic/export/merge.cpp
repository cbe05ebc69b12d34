#include "moesaic/export/merge.h"

#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"

namespace moesaic::exporting {
namespace {

/// Takes tensors out of an adapter by name, so that what is left was not understood.
class Claims {
 public:
  explicit Claims(formats::TensorMap tensors) : tensors_(std::move(tensors)) {}
  torch::Tensor take(const std::string& name) {
    auto node = tensors_.extract(name);
    return node.empty() ? torch::Tensor() : node.mapped().to(torch::kFloat32);
  }
  const formats::TensorMap& left() const { return tensors_; }

 private:
  formats::TensorMap tensors_;
};

/// The site names of tensors that end with `suffix`.
std::vector<std::string> sites_with(const formats::TensorMap& tensors, const std::string& suffix) {
  std::vector<std::string> sites;
  for (const auto& [name, tensor] : tensors) {
    if (name.ends_with(suffix)) sites.push_back(name.substr(0, name.size() - suffix.size()));
  }
  return sites;
}

std::string shape_text(const at::Tensor& tensor) { return fmt::format("[{}]", fmt::join(tensor.sizes(), ", ")); }

}  // namespace

formats::ModelFolder model_folder(const formats::Checkpoint& checkpoint, at::ScalarType dtype) {
  formats::ModelFolder folder;
  folder.config = checkpoint.config();
  folder.dtype = dtype;
  for (const std::string& name : checkpoint.names()) folder.tensors[name] = checkpoint.tensor(name);
  folder.tokenizer_json = checkpoint.tokenizer_json();
  folder.tokenizer_config = checkpoint.tokenizer_config();
  folder.chat_template = checkpoint.chat_template();
  folder.generation_config = checkpoint.generation_config();
  return folder;
}

void merge_adapter(formats::ModelFolder& model, const std::filesystem::path& adapter_dir) {
  torch::NoGradGuard no_grad;
  const auto folder = formats::read_adapter_folder(adapter_dir);
  const auto config = adapters::parse_adapter_config(folder.config, (adapter_dir / "adapter_config.json").string());
  MOESAIC_CHECK(
      config.num_experts == 1, UsageError,
      "{}: {} with {} experts can't be merged: its router mixes the experts anew for every token, so no single "
      "weight equals it\nhint: use it with --adapter, or `moesaic export --format peft` for its experts one "
      "by one",
      adapter_dir.string(), config.method, config.num_experts);
  MOESAIC_CHECK(config.k_site != "post_qk_norm", UsageError,
                "{}: its key scales act behind the per-head norm and can't be folded into a linear",
                adapter_dir.string());

  std::vector<std::string> wrong;
  Claims claims(folder.tensors);
  // The base weight of a site in float32, or undefined (and noted) when it is missing or of another shape.
  auto weight_of = [&](const std::string& site, int64_t out, int64_t in) -> torch::Tensor {
    auto found = model.tensors.find(site + ".weight");
    if (found == model.tensors.end()) {
      wrong.push_back(fmt::format("{}: the model has no {}.weight", site, site));
      return {};
    }
    const auto& weight = found->second;
    if (weight.dim() != 2 || (out >= 0 && weight.size(0) != out) || (in >= 0 && weight.size(1) != in)) {
      wrong.push_back(fmt::format("{}: the model's weight is {}, the adapter is for [{}, {}]", site, shape_text(weight),
                                  out < 0 ? "out" : std::to_string(out), in < 0 ? "in" : std::to_string(in)));
      return {};
    }
    return weight.to(torch::kFloat32);
  };

  for (const std::string& site : sites_with(folder.tensors, ".lora_A.weight")) {
    auto a = claims.take(site + ".lora_A.weight"), b = claims.take(site + ".lora_B.weight");
    if (b.defined() && a.dim() == 3 && a.size(0) == 1) a = a[0];
    if (b.defined() && b.dim() == 3 && b.size(0) == 1) b = b[0];
    if (!b.defined() || a.dim() != 2 || b.dim() != 2 || a.size(0) != b.size(1)) {
      wrong.push_back(fmt::format("{}: lora_A {} needs a lora_B [out, {}], got {}", site, shape_text(a), a.size(0),
                                  b.defined() ? shape_text(b) : "none"));
      continue;
    }
    const auto weight = weight_of(site, b.size(0), a.size(1));
    if (!weight.defined()) continue;
    const double rank = static_cast<double>(adapters::pattern_value(config.rank_pattern, site, config.lora_rank));
    const double alpha = adapters::pattern_value(config.alpha_pattern, site, config.lora_alpha);
    model.tensors[site + ".weight"] =
        torch::addmm(weight, b, a, 1.0, alpha / (config.use_rslora ? std::sqrt(rank) : rank));
  }

  for (const char* suffix : {".ia3_l", ".mov.weight"}) {
    for (const std::string& site : sites_with(folder.tensors, suffix)) {
      const auto scale = claims.take(site + suffix).flatten();
      const bool scales_input = adapters::matches_target(config.feedforward, site);
      const auto weight = scales_input ? weight_of(site, -1, scale.numel()) : weight_of(site, scale.numel(), -1);
      if (!weight.defined()) continue;
      model.tensors[site + ".weight"] = scales_input ? weight * scale : weight * scale.unsqueeze(1);
      if (auto bias = model.tensors.find(site + ".bias"); bias != model.tensors.end() && !scales_input) {
        bias->second = bias->second.to(torch::kFloat32) * scale;
      }
    }
  }
  for (const auto& [name, tensor] : claims.left()) wrong.push_back(fmt::format("{}: unexpected tensor", name));
  MOESAIC_CHECK(wrong.empty(), DataError, "{} does not fit the model:\n  {}\nhint: wrong base model?",
                adapter_dir.string(), fmt::join(wrong, "\n  "));
}

}  // namespace moesaic::exporting
