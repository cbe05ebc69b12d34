// Experts that are a base with an adapter each.
#include <torch/torch.h>

#include <algorithm>

#include "moesaic/adapters/adapter.h"
#include "moesaic/export/experts.h"

namespace moesaic::exporting {
namespace {

bool is_pair_of(const std::string& tensor, const char* part) {
  return tensor.starts_with("model.layers.") && tensor.find(part) != std::string::npos &&
         !adapters::module_of(tensor).empty();
}

/// One LoRA, matrix by matrix.
class Lora {
 public:
  explicit Lora(const std::filesystem::path& dir) : where_(dir.string()), folder_(formats::read_adapter_folder(dir)) {
    const auto config = adapters::parse_adapter_config(folder_, where_ + "/adapter_config.json");
    fingerprint_ = config.base_fingerprint;
    MOESAIC_CHECK(config.method == "lora", UsageError, "{}: got an adapter of {}, expected lora: one pair per matrix",
                  where_, config.method);
    std::vector<std::string> others;
    for (const auto& [name, _] : folder_.tensors) {
      if (!is_pair_of(name, ".mlp.") && !is_pair_of(name, ".self_attn.")) others.push_back(name);
    }
    MOESAIC_CHECK(others.empty(), UsageError,
                  "{}: got tensors that are neither of feed-forward networks nor of attention, which an expert can't "
                  "hold: {}",
                  where_, fmt::join(others, ", "));
  }

  bool touches_attention() const {
    return std::any_of(folder_.tensors.begin(), folder_.tensors.end(),
                       [](const auto& item) { return is_pair_of(item.first, ".self_attn."); });
  }

  /// Whether it still changes nothing: every B is 0.
  bool is_zero() const {
    return std::all_of(folder_.tensors.begin(), folder_.tensors.end(), [](const auto& item) {
      return !item.first.ends_with(".lora_B.weight") || item.second.count_nonzero().template item<int64_t>() == 0;
    });
  }

  /// The weight `name` with its pair folded in, float32; as it is where there is none.
  at::Tensor folded(const std::string& name, const at::Tensor& weight) const {
    formats::AdapterFolder own{folder_.config, {}, folder_.spelling};
    for (const auto& item : folder_.tensors) {
      if (adapters::module_of(item.first) + ".weight" == name) own.tensors.insert(item);
    }
    if (own.tensors.empty()) return weight;
    formats::TensorMap model{{name, weight}};
    adapters::fold(own, where_, model);
    return model.at(name);
  }

  /// Throws DataError for pairs of modules that `base` has not; warns when it was trained on other weights.
  void check_fits(const formats::Checkpoint& base) const {
    for (const auto& [name, _] : folder_.tensors) {
      const std::string weight = adapters::module_of(name) + ".weight";
      MOESAIC_CHECK(base.contains(weight), DataError, "{}: '{}' belongs to no tensor of {}: wrong base model?", where_,
                    name, base.path().string());
    }
    if (!fingerprint_.empty() && !formats::may_be_same_weights(fingerprint_, base.fingerprint())) {
      spdlog::warn("{}: the adapter was trained on other weights than {}'s", where_, base.path().string());
    }
  }

 private:
  std::string where_, fingerprint_;  // fingerprint_: of the weights it was trained on; "" when it doesn't say
  formats::AdapterFolder folder_;
};

class LoraExperts : public Experts {
 public:
  LoraExperts(const Upcycling& wanted, const SparseFamily& family, std::shared_ptr<const formats::Checkpoint> base)
      : wanted_(wanted), dense_(std::move(base)) {
    for (const auto& dir : wanted.adapters) {
      loras_.emplace_back(dir);
      loras_.back().check_fits(dense_.checkpoint());
      MOESAIC_CHECK(!wanted.attention.empty() || !loras_.back().touches_attention(), UsageError,
                    "{}: has pairs at attention, which all experts share\nhint: `attention: average` folds in the mean "
                    "of all adapters', `attention: drop` leaves them out",
                    dir.string());
    }
    zero_ = std::all_of(loras_.begin(), loras_.end(), [](const Lora& lora) { return lora.is_zero(); });
    sizes_ = {wanted.num_experts, wanted.experts_per_token, dense_.width(), family.shared ? 1 : 0};
  }

  const SparseSizes& sizes() const override { return sizes_; }
  at::Tensor expert(int64_t layer, Part part, int64_t e) override {
    return loras_[e].folded(dense_name(layer, part), dense_.matrix(layer, part));
  }
  at::Tensor router(int64_t layer) override {
    return drawn_rows(wanted_, "router", layer, wanted_.num_experts, dense_.model_width());
  }
  at::Tensor shared(int64_t, Part part) override { return silent_shared(dense_.model_width(), part); }
  at::Tensor shared_gate(int64_t) override { return torch::zeros({1, dense_.model_width()}); }

  /// The mean over adapters of the weight with each folded in.
  at::Tensor beside(const std::string& name, at::Tensor dense) override {
    if (wanted_.attention != "average" || name.find(".self_attn.") == std::string::npos) return dense;
    at::Tensor sum = torch::zeros(dense.sizes(), torch::kFloat32);
    for (const Lora& lora : loras_) sum += lora.folded(name, dense);
    return sum / static_cast<double>(loras_.size());
  }

  bool equals_dense() const override { return zero_; }
  std::string promise() const override {
    return zero_ ? "equal: every adapter's B is still 0"
                 : "not equal by intent: each expert is the base with its adapter";
  }

 private:
  Upcycling wanted_;
  DenseFfn dense_;
  std::vector<Lora> loras_;
  bool zero_ = false;
  SparseSizes sizes_;
};

}  // namespace

std::unique_ptr<Experts> make_lora_experts(const Upcycling& wanted, const SparseFamily& family,
                                           std::shared_ptr<const formats::Checkpoint> base) {
  return std::make_unique<LoraExperts>(wanted, family, std::move(base));
}

}  // namespace moesaic::exporting
