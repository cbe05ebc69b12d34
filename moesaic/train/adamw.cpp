#include "moesaic/base/check.h"
#include "moesaic/train/optimizer.h"
#include "moesaic/train/optimizer_state.h"

namespace moesaic::train {
namespace {

class AdamW : public Optimizer {
 public:
  AdamW(std::vector<OptimizedTensor> tensors, const AdamWOptions& options)
      : tensors_(std::move(tensors)), options_(options) {
    for (const auto& t : tensors_) {
      m_.push_back(torch::zeros_like(t.tensor, t.tensor.options().requires_grad(false)));
      v_.push_back(torch::zeros_like(t.tensor, t.tensor.options().requires_grad(false)));
      steps_.push_back(torch::zeros({}, t.tensor.options().dtype(torch::kFloat32).requires_grad(false)));
    }
  }

  void step(double factor) override {
    torch::NoGradGuard no_grad;
    // One fused call per pair of learning rate and weight decay.
    std::map<std::pair<double, double>, std::vector<size_t>> groups;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].tensor.grad().defined()) {
        groups[{tensors_[i].learning_rate, tensors_[i].weight_decay}].push_back(i);
      }
    }
    for (const auto& [rates, members] : groups) {
      std::vector<torch::Tensor> p, g, m, v, steps;
      for (size_t i : members) {
        steps_[i].add_(1);
        p.push_back(tensors_[i].tensor);
        g.push_back(tensors_[i].tensor.grad());
        m.push_back(m_[i]);
        v.push_back(v_[i]);
        steps.push_back(steps_[i]);
      }
      at::_fused_adamw_(p, g, m, v, {}, steps, rates.first * factor, options_.beta1, options_.beta2, rates.second,
                        options_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
    }
  }

  formats::TensorMap state() const override {
    formats::TensorMap slots;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      slots[tensors_[i].name + ".exp_avg"] = m_[i];
      slots[tensors_[i].name + ".exp_avg_sq"] = v_[i];
      slots[tensors_[i].name + ".step"] = steps_[i];
    }
    return slots;
  }

  void load_state(const formats::TensorMap& state) override { restore_slots(state, this->state()); }

 private:
  std::vector<OptimizedTensor> tensors_;
  AdamWOptions options_;
  std::vector<torch::Tensor> m_, v_, steps_;
};

}  // namespace

std::unique_ptr<Optimizer> make_adamw(std::vector<OptimizedTensor> tensors, const AdamWOptions& options) {
  return std::make_unique<AdamW>(std::move(tensors), options);
}

}  // namespace moesaic::train
