#include "moesaic/export/prompt_gates.h"

#include <torch/torch.h>

#include "moesaic/base/seed.h"
#include "moesaic/models/registry.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::exporting {
namespace {

constexpr double kTiny = 1e-8;
/// Condition number of a layer's rows above which they are hardly different.
constexpr double kAlike = 5.0;

at::Tensor unit_rows(const at::Tensor& rows) { return rows / rows.norm(2, {-1}, /*keepdim=*/true).clamp_min(kTiny); }

/// What prompts give every layer, [L, d].
class PromptStates {
 public:
  virtual ~PromptStates() = default;
  at::Tensor of(const std::vector<std::string>& prompts) const {
    std::vector<at::Tensor> states;
    for (const std::string& prompt : prompts) {
      const auto ids = tokenizer_->encode(tokenizer_->bos_token().value_or("") + prompt, false);
      MOESAIC_CHECK(!ids.empty(), UsageError, "prompts: got '{}', which has no token", prompt);
      states.push_back(of_one(ids));
    }
    return together(torch::stack(states));
  }

 protected:
  explicit PromptStates(const formats::Checkpoint& base) : tokenizer_(tokenizer::Tokenizer::open(base)) {}
  virtual at::Tensor of_one(const std::vector<int64_t>& ids) const = 0;
  /// states: [P, L, d]
  virtual at::Tensor together(const at::Tensor& states) const = 0;

 private:
  std::shared_ptr<tokenizer::Tokenizer> tokenizer_;
};

class HiddenStates : public PromptStates {
 public:
  HiddenStates(const formats::Checkpoint& base, bool average)
      : PromptStates(base), model_(models::load_model(base)), average_(average) {}

 protected:
  at::Tensor of_one(const std::vector<int64_t>& ids) const override {
    std::vector<at::Tensor> entering;
    nn::Pass pass;
    pass.run = [&](nn::Block& block, const at::Tensor& h, nn::Pass& inner) {
      entering.push_back(average_ ? h.mean(0) : h[-1].clone());
      return block.forward(h, inner);
    };
    model_->hidden({nn::RaggedBatch::from_sequences({ids})}, pass);
    return torch::stack(entering);
  }
  at::Tensor together(const at::Tensor& states) const override { return states.mean(0); }

 private:
  std::shared_ptr<models::SingleModel> model_;
  bool average_;
};

class Embeddings : public PromptStates {
 public:
  Embeddings(const formats::Checkpoint& base, int64_t layers)
      : PromptStates(base), table_(base.tensor("model.embed_tokens.weight")), layers_(layers) {}

 protected:
  at::Tensor of_one(const std::vector<int64_t>& ids) const override {
    const at::Tensor rows = table_.index_select(0, torch::tensor(ids)).to(torch::kFloat32);
    return rows.sum(0).expand({layers_, -1});
  }
  at::Tensor together(const at::Tensor& states) const override { return unit_rows(states.sum(0)); }

 private:
  at::Tensor table_;
  int64_t layers_;
};

void warn_of_alike(const at::Tensor& gates) {
  std::vector<int64_t> alike;
  for (int64_t layer = 0; layer < gates.size(0); ++layer) {
    if (torch::linalg_cond(gates[layer]).item<double>() > kAlike) alike.push_back(layer);
  }
  if (alike.empty()) return;
  spdlog::warn(
      "the gates of {} of {} layers are nearly the same for several experts (layers {}): some will hardly be "
      "chosen\nhint: prompts that differ more, or negative_prompts",
      alike.size(), gates.size(0), fmt::join(alike, ", "));
}

}  // namespace

at::Tensor prompt_gates(const formats::Checkpoint& base, const std::vector<SourceExpert>& sources,
                        const std::string& mode, uint64_t seed, const char* use) {
  const auto config = models::parse_decoder_config(base.config(), base.path().string());
  const auto count = static_cast<int64_t>(sources.size());
  auto generator = make_generator(derive_seed(seed, use));
  const std::vector<int64_t> shape{config.num_layers, count, config.hidden_size};
  if (mode == "random") return torch::randn(shape, generator, torch::kFloat32);
  if (mode == "uniform_random") {
    return (2 * torch::rand(shape, generator, torch::kFloat32) - 1) /
           std::sqrt(static_cast<double>(config.hidden_size));
  }
  std::unique_ptr<PromptStates> states;
  if (mode == "cheap_embed") {
    states = std::make_unique<Embeddings>(base, config.num_layers);
  } else {
    states = std::make_unique<HiddenStates>(base, mode == "hidden_avg");
  }
  std::vector<at::Tensor> rows;
  for (const SourceExpert& source : sources) {
    at::Tensor row = states->of(source.positive);
    if (!source.negative.empty()) row = row - states->of(source.negative);
    rows.push_back(unit_rows(row));
  }
  at::Tensor gates = torch::stack(rows, 1);
  if (count > 1) warn_of_alike(gates);
  return gates;
}

}  // namespace moesaic::exporting
