// Experts that are the feed-forward networks of other models.
#include <torch/torch.h>

#include "moesaic/base/text.h"
#include "moesaic/export/experts.h"
#include "moesaic/export/prompt_gates.h"
#include "moesaic/models/registry.h"

namespace moesaic::exporting {
namespace {

/// mergekit's word for what it writes, or a model_type.
bool names_family(const std::string& architecture, const SparseFamily& family) {
  if (architecture == family.model_type) return true;
  return (architecture == "qwen" && std::string_view(family.model_type) == "qwen2_moe") ||
         (architecture == "qwen3" && std::string_view(family.model_type) == "qwen3_moe");
}

class MergedExperts : public Experts {
 public:
  MergedExperts(const Upcycling& wanted, const SparseFamily& family, std::shared_ptr<const formats::Checkpoint> base)
      : wanted_(wanted), base_(std::move(base)) {
    MOESAIC_CHECK(wanted.architecture.empty() || names_family(wanted.architecture, family), UsageError,
                  "architecture: got {}, but the base becomes {}", wanted.architecture, family.model_type);
    MOESAIC_CHECK(wanted.shared.size() <= (family.shared ? 1 : 0), UsageError, "shared_experts: got {}, but {} has {}",
                  wanted.shared.size(), family.model_type, family.shared ? "one" : "none");
    for (const auto* list : {&wanted.experts, &wanted.shared}) {
      for (const SourceExpert& source : *list) open(source.model, family);
    }
    const int64_t shared_width = !family.shared ? 0 : wanted.shared.empty() ? 1 : base_.width();
    sizes_ = {wanted.num_experts, wanted.experts_per_token, base_.width(), shared_width};
    gates_ = gates(wanted.experts, "gates");
    if (!wanted.shared.empty()) shared_gates_ = gates(wanted.shared, "shared gates");
  }

  const SparseSizes& sizes() const override { return sizes_; }
  at::Tensor expert(int64_t layer, Part part, int64_t e) override {
    return of_source(wanted_.experts[e], layer, part, e);
  }
  at::Tensor router(int64_t layer) override { return gates_[layer]; }
  at::Tensor shared(int64_t layer, Part part) override {
    if (wanted_.shared.empty()) return silent_shared(base_.model_width(), part);
    return of_source(wanted_.shared[0], layer, part, wanted_.num_experts);
  }
  at::Tensor shared_gate(int64_t layer) override {
    return wanted_.shared.empty() ? torch::zeros({1, base_.model_width()}) : shared_gates_[layer];
  }
  bool equals_dense() const override { return false; }
  std::string promise() const override {
    return "not equal by intent: experts are other models' networks, and attention and norms the base's";
  }

 private:
  void open(const std::filesystem::path& path, const SparseFamily& family) {
    if (sources_.contains(path)) return;
    const std::shared_ptr<const formats::Checkpoint> source = models::open_checkpoint(path);
    const std::string where = path.string();
    MOESAIC_CHECK(&sparse_family(source->config(), where) == &family, UsageError,
                  "{}: got a model that becomes {}, but the base becomes {}", where,
                  sparse_family(source->config(), where).model_type, family.model_type);
    models::load_model(*source, {.device = torch::kMeta});
    const DenseFfn& ffn = sources_.emplace(path, DenseFfn(source)).first->second;
    auto sizes = [](const DenseFfn& of) { return std::vector{of.layers(), of.width(), of.model_width()}; };
    MOESAIC_CHECK(sizes(ffn) == sizes(base_), DataError,
                  "{}: got layers, width of the feed-forward networks and of the model {}, expected the base's {}",
                  where, shape_text(sizes(ffn)), shape_text(sizes(base_)));
    const Json act = source->config().value("hidden_act", Json("silu"));
    MOESAIC_CHECK(act == base_.checkpoint().config().value("hidden_act", Json("silu")), UsageError,
                  "{}: hidden_act: got {}, which is not the base's", where, act.dump());
  }

  at::Tensor gates(const std::vector<SourceExpert>& sources, const char* use) const {
    return prompt_gates(base_.checkpoint(), sources, wanted_.gate_mode, wanted_.seed, use);
  }

  at::Tensor of_source(const SourceExpert& source, int64_t layer, Part part, int64_t number) {
    at::Tensor matrix = sources_.at(source.model).matrix(layer, part);
    if (source.noise_scale > 0) {
      matrix = with_noise(matrix, source.noise_scale, wanted_.seed, layer, part, number);
    }
    if (part == Part::kDown && source.residual_scale != 1) matrix = matrix.to(torch::kFloat32) * source.residual_scale;
    return matrix;
  }

  Upcycling wanted_;
  DenseFfn base_;
  std::map<std::filesystem::path, DenseFfn> sources_;
  SparseSizes sizes_;
  at::Tensor gates_, shared_gates_;  // [L, E, d], [L, 1, d]
};

}  // namespace

std::unique_ptr<Experts> make_merged_experts(const Upcycling& wanted, const SparseFamily& family,
                                             std::shared_ptr<const formats::Checkpoint> base) {
  return std::make_unique<MergedExperts>(wanted, family, std::move(base));
}

}  // namespace moesaic::exporting
