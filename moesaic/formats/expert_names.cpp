#include "moesaic/formats/expert_names.h"

#include <ATen/ATen.h>

#include "moesaic/base/check.h"

namespace moesaic::formats {
namespace {

constexpr int64_t kMaxExperts = 1 << 16;
constexpr ExpertNames kMixtral{"block_sparse_moe", "w1", "w3", "w2"};

bool is_granite(const std::string& model_type) {
  return model_type == "granitemoe" || model_type == "granitemoeshared";
}

/// "model.layers.3." of a layer's tensor, "" of others.
std::string layer_of(const std::string& name) {
  constexpr std::string_view kLayers = "model.layers.";
  if (!name.starts_with(kLayers)) return "";
  const size_t end = name.find('.', kLayers.size());
  return end == std::string::npos ? "" : name.substr(0, end + 1);
}

/// `name` behind `prefix`; nullopt when it does not begin so.
std::optional<std::string> behind(const std::string& name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  return name.substr(prefix.size());
}

/// One file's tensors under their new names.
class Unstacker {
 public:
  Unstacker(const ExpertNames& names, const std::string& where) : names_(names), where_(where) {}

  void add(const std::string& stored, const std::vector<int64_t>& shape) {
    const std::string layer = layer_of(stored);
    if (layer.empty()) {
      put(stored, {stored});
      return;
    }
    if (const auto part = behind(stored, layer + "shared_mlp.")) {
      add_shared(layer + names_.block + ".shared_expert.", stored, *part, shape);
      return;
    }
    std::optional<std::string> part;
    for (const char* block : {"mlp.", "block_sparse_moe."}) {
      if (!part) part = behind(stored, layer + block);
    }
    if (!part || !add_part(layer + names_.block + ".", stored, *part, shape)) put(stored, {stored});
  }

  std::map<std::string, StoredRows> tensors;

 private:
  bool add_part(const std::string& block, const std::string& stored, const std::string& part,
                const std::vector<int64_t>& shape) {
    if (part == "gate.weight" || part == "router.weight" || part == "router.layer.weight") {
      put(block + "gate.weight", {stored});
      return true;
    }
    if (part == "shared_expert_gate.weight") {  // llama.cpp keeps it as a vector
      put(block + part, shape.size() == 1 ? StoredRows{stored, 0, 1} : StoredRows{stored});
      return true;
    }
    const bool granite_in = part == "input_linear.weight", granite_out = part == "output_linear.weight";
    if (!part.starts_with("experts.") && !part.starts_with("shared_expert.") && !granite_in && !granite_out) {
      return false;
    }
    const std::string own = own_name(granite_out ? "experts.down_proj.weight" : part);
    if (shape.size() != 3 || shape[0] > kMaxExperts) {
      put(block + own, {stored});
      return true;
    }
    const bool both = part.starts_with("experts.gate_up_proj") || granite_in;
    for (int64_t e = 0; e < shape[0]; ++e) {
      const std::string expert = fmt::format("{}experts.{}.", block, e);
      if (both) {
        add_halves(expert, stored, e * shape[1], shape[1]);
      } else {
        put(expert + own.substr(std::strlen("experts.")), {stored, e * shape[1], shape[1]});
      }
    }
    return true;
  }

  /// "experts.3.gate_proj.weight" by what the family calls its matrices.
  std::string own_name(std::string part) const {
    for (const auto& [plain, own] :
         {std::pair{"gate_proj", names_.gate_proj}, {"up_proj", names_.up_proj}, {"down_proj", names_.down_proj}}) {
      const std::string end = std::string(".") + plain;
      for (const std::string suffix : {".weight", ""}) {
        if (!part.ends_with(end + suffix)) continue;
        return part.substr(0, part.size() - end.size() - suffix.size() + 1) + own + ".weight";
      }
    }
    return part;
  }

  void add_shared(const std::string& expert, const std::string& stored, const std::string& part,
                  const std::vector<int64_t>& shape) {
    if (part == "input_linear.weight" && shape.size() == 2) {
      add_halves(expert, stored, 0, shape[0]);
    } else if (part == "output_linear.weight") {
      put(expert + names_.down_proj + ".weight", {stored});
    } else {
      put(stored, {stored});
    }
  }

  /// Of `rows` rows the first half is gate's and the second up's.
  void add_halves(const std::string& expert, const std::string& stored, int64_t begin, int64_t rows) {
    MOESAIC_CHECK(rows % 2 == 0, FormatError, "{}: tensor '{}': got {} rows of gate and up, expected as many of both",
                  where_, stored, rows);
    put(expert + names_.gate_proj + ".weight", {stored, begin, rows / 2});
    put(expert + names_.up_proj + ".weight", {stored, begin + rows / 2, rows / 2});
  }

  void put(const std::string& name, const StoredRows& rows) {
    const auto [at, fresh] = tensors.emplace(name, rows);
    MOESAIC_CHECK(fresh, FormatError, "{}: two tensors mean '{}': '{}' and '{}'", where_, name, at->second.stored,
                  rows.stored);
  }

  ExpertNames names_;
  const std::string& where_;
};

}  // namespace

std::optional<ExpertNames> expert_names(const std::string& model_type) {
  if (model_type == "mixtral" || is_granite(model_type)) return kMixtral;
  if (model_type == "qwen2_moe" || model_type == "qwen3_moe" || model_type == "olmoe") return ExpertNames();
  return std::nullopt;
}

std::map<std::string, StoredRows> unstacked(const ExpertNames& names,
                                            const std::map<std::string, std::vector<int64_t>>& shapes,
                                            const std::string& where) {
  Unstacker unstacker(names, where);
  for (const auto& [stored, shape] : shapes) unstacker.add(stored, shape);
  return std::move(unstacker.tensors);
}

Json with_both_expert_counts(Json config) {
  for (const auto& [there, absent] :
       {std::pair{"num_experts", "num_local_experts"}, {"num_local_experts", "num_experts"}}) {
    if (config.contains(there) && !config.contains(absent)) config[absent] = Json(config[there]);
  }
  return config;
}

TensorMap stacked(const std::string& model_type, TensorMap tensors) {
  if (!is_granite(model_type)) return tensors;
  auto take = [&](const std::string& name) {
    auto node = tensors.extract(name);
    MOESAIC_CHECK(!node.empty(), DataError, "experts of {}: has no tensor '{}'", model_type, name);
    return at::Tensor(node.mapped());
  };
  auto pair = [&](const std::string& expert) {
    return at::cat({take(expert + "w1.weight"), take(expert + "w3.weight")});
  };
  std::vector<std::string> blocks;
  for (const auto& [name, _] : tensors) {
    if (const size_t end = name.find(".block_sparse_moe.gate.weight"); end != std::string::npos) {
      blocks.push_back(name.substr(0, end));
    }
  }
  for (const std::string& layer : blocks) {
    const std::string block = layer + ".block_sparse_moe.", shared = block + "shared_expert.";
    std::vector<at::Tensor> in, out;
    for (int64_t e = 0; tensors.contains(fmt::format("{}experts.{}.w1.weight", block, e)); ++e) {
      const std::string expert = fmt::format("{}experts.{}.", block, e);
      in.push_back(pair(expert));
      out.push_back(take(expert + "w2.weight"));
    }
    tensors[block + "input_linear.weight"] = at::stack(in);
    tensors[block + "output_linear.weight"] = at::stack(out);
    tensors[block + "router.layer.weight"] = take(block + "gate.weight");
    if (!tensors.contains(shared + "w1.weight")) continue;
    tensors[layer + ".shared_mlp.input_linear.weight"] = pair(shared);
    tensors[layer + ".shared_mlp.output_linear.weight"] = take(shared + "w2.weight");
  }
  return tensors;
}

}  // namespace moesaic::formats
