#include "moesaic/export/gguf.h"

#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/expert_pairs.h"
#include "moesaic/adapters/replacements.h"
#include "moesaic/base/check.h"
#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/gguf_checkpoint.h"
#include "moesaic/formats/gguf_writer.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"

namespace moesaic::exporting {
namespace {

/// Every linear of a model, and how many heads its rows are cut into.
std::map<std::string, int64_t> heads_of_linears(const models::DecoderConfig& config) {
  models::CausalLM model(config, torch::TensorOptions(torch::kMeta));
  std::map<std::string, int64_t> heads;
  for (const nn::LinearSite& site : model.sites().linears) {
    heads[site.name] = site.role == nn::Role::kQuery ? config.num_heads
                       : site.role == nn::Role::kKey ? config.num_kv_heads
                                                     : 0;
  }
  return heads;
}

/// llama.cpp's order of the rows of queries and keys: what rotates together stands side by side.
torch::Tensor interleaved(const torch::Tensor& rows, int64_t heads) {
  return rows.view({heads, 2, -1, rows.size(1)}).transpose(1, 2).reshape(rows.sizes());
}

/// "model.layers.3.mlp.experts.gate_proj" and 7 of "model.layers.3.mlp.experts.7.gate_proj", whatever the family calls
/// it; nullopt of what is no expert's.
std::optional<std::pair<std::string, int64_t>> stack_of(const std::string& site, const formats::ExpertNames& names) {
  const std::string block = fmt::format(".{}.experts.", names.block);
  const size_t at = site.find(block), number = at + block.size(), part = site.rfind('.');
  if (at == std::string::npos) return std::nullopt;
  const std::string own = site.substr(part + 1);
  const char* plain = own == names.gate_proj ? "gate_proj" : own == names.up_proj ? "up_proj" : "down_proj";
  return std::pair(fmt::format("{}.mlp.experts.{}", site.substr(0, at), plain),
                   std::stoll(site.substr(number, part - number)));
}

}  // namespace

std::string gguf_adapter(const std::filesystem::path& adapter_dir, const Json& base_config, const std::string& where) {
  const auto folder = formats::read_adapter_folder(adapter_dir);
  const std::string from = adapter_dir.string();
  auto config = adapters::parse_adapter_config(folder, (adapter_dir / "adapter_config.json").string());
  const adapters::Method& method = adapters::method_of(config.method);
  MOESAIC_CHECK(method.low_rank && config.num_experts == 1, UsageError,
                "{}: {} with {} experts: llama.cpp adds one low-rank pair to a linear\nhint: `moesaic export --format "
                "peft` writes each expert of a MoLoRA as a LoRA of its own; (IA)^3 can be merged",
                from, config.method, config.num_experts);
  const formats::GgufArchitecture& architecture = models::gguf_architecture(base_config, where);
  const models::DecoderConfig base = models::parse_decoder_config(base_config, where);
  const auto heads = heads_of_linears(base);
  std::set<std::string> modules;
  for (const auto& [site, _] : heads) modules.insert(site);
  formats::TensorMap tensors = folder.tensors;
  adapters::settle_expert_pairs(config, tensors, modules);
  const auto whole = adapters::acting_whole(config, tensors);
  MOESAIC_CHECK(whole.empty(), UsageError,
                "{}: got {}, expected low-rank pairs of linears alone\nhint: `moesaic merge` it", from,
                fmt::join(whole, ", "));

  const auto names = formats::expert_names(base.model_type);
  struct Pair {
    std::map<int64_t, torch::Tensor> a, b;  // by expert; of a dense linear under 0
    bool stack = false;
  };
  std::map<std::string, Pair> pairs;  // by llama.cpp's name
  for (const auto& [name, tensor] : tensors) {
    const std::string site = adapters::module_of(name);
    const auto known = heads.find(site);
    MOESAIC_CHECK(known != heads.end(), DataError, "{}: got '{}', which the base {} has not", from, name, where);
    const auto expert = names ? stack_of(site, *names) : std::nullopt;
    const std::string gguf = formats::gguf_name((expert ? expert->first : site) + ".weight", architecture);
    MOESAIC_CHECK(!gguf.empty(), UsageError, "{}: '{}': llama.cpp has no name for it in its {}", from, name,
                  architecture.name);
    Pair& pair = pairs[gguf];
    pair.stack = expert.has_value();
    torch::Tensor values = method.expert_tensor(config, name, tensor, 0).second.to(torch::kFloat32);
    const bool is_a = name.ends_with(".lora_A.weight");
    if (!is_a) {
      // llama.cpp multiplies by alpha / r, one alpha for all; here it is 1.
      values = values * (config.scale_at(site) * static_cast<double>(config.rank_at(site)));
      if (architecture.interleaved_heads && known->second > 0) values = interleaved(values, known->second);
    }
    (is_a ? pair.a : pair.b)[expert ? expert->second : 0] = values;
  }

  formats::GgufWriter file;
  file.add("general.type", std::string("adapter"));
  file.add("general.architecture", std::string(architecture.name));
  file.add("adapter.type", std::string("lora"));
  file.add("adapter.lora.alpha", 1.0f);
  const int64_t experts = base.sparse ? base.sparse->experts : 0;
  for (const auto& [name, pair] : pairs) {
    for (const auto& [end, parts] : {std::pair(".lora_a", &pair.a), {".lora_b", &pair.b}}) {
      std::vector<torch::Tensor> all;
      for (const auto& [_, part] : *parts) all.push_back(part);
      MOESAIC_CHECK(std::ssize(all) == (pair.stack ? experts : 1), UsageError,
                    "{}: {}: got pairs of {} experts, expected all {}", from, name, all.size(), experts);
      file.add_tensor(name + end, pair.stack ? torch::stack(all) : all.front());
    }
  }
  return file.bytes();
}

}  // namespace moesaic::exporting
