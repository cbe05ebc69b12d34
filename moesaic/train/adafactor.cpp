#include "moesaic/base/check.h"
#include "moesaic/train/optimizer.h"
#include "moesaic/train/optimizer_state.h"

namespace moesaic::train {
namespace {

torch::Tensor root_mean_square(const torch::Tensor& x) {
  return at::linalg_vector_norm(x).div_(std::sqrt(static_cast<double>(x.numel())));
}

class Adafactor : public Optimizer {
 public:
  Adafactor(std::vector<OptimizedTensor> tensors, const AdafactorOptions& options)
      : tensors_(std::move(tensors)), options_(options) {
    for (const auto& t : tensors_) {
      const auto& p = t.tensor;
      const auto float_options = p.options().dtype(torch::kFloat32).requires_grad(false);
      Slots slots;
      if (t.may_factor && p.dim() == 2 && std::min(p.size(0), p.size(1)) >= options_.min_dim_to_factor) {
        slots.rows = torch::zeros({p.size(0)}, float_options);
        slots.columns = torch::zeros({p.size(1)}, float_options);
      } else {
        slots.v = torch::zeros(p.sizes(), float_options);
      }
      slots_.push_back(slots);
    }
  }

  void step(double factor) override {
    torch::NoGradGuard no_grad;
    const int64_t done = step_.item<int64_t>();
    const double t = static_cast<double>(options_.initial_step + done + 1);
    const double mixing = std::pow(t, -options_.decay_exponent);  // 1 - b2
    for (size_t i = 0; i < tensors_.size(); ++i) {
      auto p = tensors_[i].tensor;
      if (!p.grad().defined()) continue;
      const auto g = p.grad().to(torch::kFloat32);
      auto& slots = slots_[i];
      const auto squared = g.square().add_(options_.epsilon1);
      torch::Tensor update;
      if (slots.v.defined()) {
        slots.v.mul_(1 - mixing).add_(squared, mixing);
        update = g * slots.v.rsqrt();
      } else {
        slots.rows.mul_(1 - mixing).add_(squared.mean(1), mixing);
        slots.columns.mul_(1 - mixing).add_(squared.mean(0), mixing);
        update = g * (slots.rows / slots.rows.mean()).rsqrt().unsqueeze(1) * slots.columns.rsqrt().unsqueeze(0);
      }
      update.div_((root_mean_square(update) / options_.clipping_threshold).clamp_min_(1.0));
      const double rate = tensors_[i].learning_rate * factor;
      update.mul_(root_mean_square(p.to(torch::kFloat32)).clamp_min_(options_.epsilon2) * rate);
      if (tensors_[i].weight_decay > 0) p.mul_(1 - rate * tensors_[i].weight_decay);
      p.sub_(update);
    }
    step_.add_(1);
  }

  formats::TensorMap state() const override {
    formats::TensorMap slots{{"step", step_}};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (slots_[i].v.defined()) {
        slots[tensors_[i].name + ".v"] = slots_[i].v;
      } else {
        slots[tensors_[i].name + ".v_row"] = slots_[i].rows;
        slots[tensors_[i].name + ".v_col"] = slots_[i].columns;
      }
    }
    return slots;
  }

  void load_state(const formats::TensorMap& state) override { restore_slots(state, this->state()); }

 private:
  struct Slots {
    torch::Tensor v;              // the tensor's shape, or
    torch::Tensor rows, columns;  // [rows], [columns]: means of g^2 + eps1
  };
  std::vector<OptimizedTensor> tensors_;
  AdafactorOptions options_;
  std::vector<Slots> slots_;
  torch::Tensor step_ = torch::zeros({}, torch::kInt64);
};

}  // namespace

std::unique_ptr<Optimizer> make_adafactor(std::vector<OptimizedTensor> tensors, const AdafactorOptions& options) {
  return std::make_unique<Adafactor>(std::move(tensors), options);
}

}  // namespace moesaic::train
