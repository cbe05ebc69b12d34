#include "examples/bitfit_adapter.h"

#include "moesaic/base/check.h"
#include "moesaic/formats/config.h"

namespace moesaic::adapters {
namespace {

constexpr const char* kTensor = ".bitfit_bias";

/// What acts in the model: one slot's share of the adapter.
class OutputBias : public nn::ScaleAdapter {
 public:
  OutputBias(torch::Tensor b, double effect) : bias(std::move(b)), effect_(effect) {}

  torch::Tensor forward(const torch::Tensor& y, nn::Pass& pass) override {
    torch::Tensor added = effect_ * bias.view(std::vector<int64_t>(y.sizes().begin() + 1, y.sizes().end()));
    if (torch::Tensor weight = pass.adapter_weight(column); weight.defined()) {  // [N, 1]
      added = (y.dim() == 3 ? weight.unsqueeze(2) : weight) * added;
    }
    return (y + added).to(y.scalar_type());
  }
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass& pass) override {
    return forward(act, pass) * up;
  }
  bool trains() const override { return bias.requires_grad(); }
  int64_t saved_per_row() const override { return 0; }

  torch::Tensor bias;   // leaf, [out], float32
  int64_t column = -1;  // of the pass's mixture; -1 = none

 private:
  double effect_;
};

class BitFitAdapter : public Adapter {
 public:
  BitFitAdapter(AdapterConfig config, nn::Sites& sites, const torch::Device& device, bool trainable, double effect) {
    config_ = std::move(config);
    std::vector<std::string> paths;
    for (const nn::LinearSite& site : sites.linears) paths.push_back(formats::spelled(config_.spelling, site.name));
    matches_ = count_matches(config_.targets, paths);
    for (const nn::ScaleSite& site : sites.scales) {
      if (site.kind != nn::ScaleKind::kOutput || !config_.adapts(site.name, site.layer)) continue;
      const int64_t out = std::max<int64_t>(1, site.heads) * site.width;
      const auto bias = torch::zeros({out}, torch::dtype(torch::kFloat32).device(device)).set_requires_grad(trainable);
      attached_.push_back({site, std::make_shared<OutputBias>(bias, effect)});
      site.slot->adapters.push_back(attached_.back().act);
    }
  }

  ~BitFitAdapter() override { detach(); }

  void detach() override {
    restore_weights();
    for (Attached& a : attached_) std::erase(a.site.slot->adapters, std::static_pointer_cast<nn::ScaleAdapter>(a.act));
    attached_.clear();
  }

  void name_as(const std::string& owner, int64_t column) override {
    owner_ = owner;
    for (Attached& a : attached_) a.act->column = column;
  }

  std::vector<nn::Parameter> parameters() override {
    std::vector<nn::Parameter> result;
    for (const Attached& a : attached_) {
      result.push_back({a.site.name + kTensor, a.act->bias, nn::Parameter::Kind::kVector});
    }
    return result;
  }

 private:
  struct Attached {
    nn::ScaleSite site;
    std::shared_ptr<OutputBias> act;
  };

  /// bitfit_bias [out].
  std::vector<FileTensor> file_tensors() const override {
    std::vector<FileTensor> result;
    for (const Attached& a : attached_) {
      const torch::Tensor bias = a.act->bias;
      result.push_back({a.site.name + kTensor, bias.sizes().vec(),
                        [bias](const torch::Tensor& t) { torch::Tensor(bias).copy_(t); },
                        [bias] { return bias.detach().cpu(); }, [bias] { return gradient_or_zeros(bias).cpu(); }});
    }
    return result;
  }

  std::vector<Attached> attached_;
};

std::shared_ptr<Adapter> make(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t /*seed*/,
                              bool trainable, double effect) {
  return std::make_shared<BitFitAdapter>(std::move(config), sites, device, trainable, effect);
}

void fold_bias(const AdapterConfig& /*config*/, const std::string& site, formats::TensorMap& tensors,
               FoldedLinear& linear) {
  auto node = tensors.extract(site + kTensor);
  if (node.empty()) return;
  const torch::Tensor bias = node.mapped().to(torch::kFloat32);
  MOESAIC_CHECK(
      linear.bias.defined() && bias.sizes() == linear.bias.sizes(), DataError,
      "{}: got a learned bias of {} numbers, expected {}", site, bias.numel(),
      linear.bias.defined() ? std::to_string(linear.bias.numel()) : "none: the linear has no bias to hold it");
  linear.bias = linear.bias + bias;
}

std::pair<std::string, torch::Tensor> expert_tensor(const AdapterConfig& /*config*/, const std::string& name,
                                                    const torch::Tensor& tensor, int64_t /*e*/) {
  return {name, tensor};
}

using enum nn::Role;
const std::vector<nn::Role> kEveryLinear{kQuery, kKey, kValue, kAttentionOut, kGate, kUp, kDown};

}  // namespace

const Method kBitFit{.name = "bitfit",
                     .peft_type = "BITFIT",
                     .summary = "one bias per linear",
                     .mixes = false,
                     .expert = "bitfit",
                     .low_rank = false,
                     .tensors = {kTensor},
                     .reference = kEveryLinear,
                     .all_linear = kEveryLinear,
                     .make = make,
                     .fold = fold_bias,
                     .expert_tensor = expert_tensor};

}  // namespace moesaic::adapters
