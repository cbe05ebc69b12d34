#include "moesaic/export/experts.h"

#include <torch/torch.h>

#include "moesaic/base/seed.h"
#include "moesaic/base/text.h"

namespace moesaic::exporting {
namespace {

at::Generator matrix_generator(uint64_t seed, const char* use, int64_t layer, int64_t e, Part part) {
  const uint64_t of_layer = derive_seed(seed, use, static_cast<uint64_t>(layer));
  return make_generator(derive_seed(of_layer, "expert", static_cast<uint64_t>(e) * 3 + static_cast<uint64_t>(part)));
}

class Copies : public Experts {
 public:
  Copies(const Upcycling& wanted, const SparseFamily& family, std::shared_ptr<const formats::Checkpoint> base)
      : wanted_(wanted), dense_(std::move(base)), halved_(family.shared && wanted.method != "residual") {
    const int64_t parts = wanted.granularity;
    MOESAIC_CHECK(dense_.width() % parts == 0, UsageError,
                  "granularity: got {}, expected a divisor of {}, the width "
                  "of the base's feed-forward networks",
                  parts, dense_.width());
    MOESAIC_CHECK(
        wanted.method != "residual" || family.shared, UsageError,
        "method: got residual, but {} has no shared expert\nhint: qwen2_moe has one, made of qwen2; here copy "
        "starts equal, too",
        family.model_type);
    sizes_ = {wanted.num_experts, wanted.experts_per_token, dense_.width() / parts, family.shared ? dense_.width() : 0};
  }

  const SparseSizes& sizes() const override { return sizes_; }

  at::Tensor expert(int64_t layer, Part part, int64_t e) override {
    const at::Tensor& dense = dense_.matrix(layer, part);
    if (wanted_.method == "virtual_group") return scaled_down(part, slice(dense, part, e % wanted_.granularity));
    if (wanted_.method == "drop") return scaled_down(part, dropped(dense, layer, part, e));
    if (wanted_.method == "residual" && part == Part::kDown) return torch::zeros_like(dense);
    return scaled_down(part, noisy(dense, layer, part, e));
  }

  at::Tensor router(int64_t layer) override {
    const int64_t copies = wanted_.num_experts / wanted_.granularity;
    return drawn_rows(wanted_, "router", layer, copies, dense_.model_width()).repeat_interleave(wanted_.granularity, 0);
  }

  at::Tensor shared(int64_t layer, Part part) override {
    const at::Tensor& dense = dense_.matrix(layer, part);
    return wanted_.method == "residual" && part == Part::kDown ? dense * 2 : dense;
  }

  at::Tensor shared_gate(int64_t) override { return torch::zeros({1, dense_.model_width()}); }

  bool equals_dense() const override {
    return wanted_.noise == 0 && (wanted_.method != "drop" || wanted_.drop_ratio == 0);
  }

  std::string promise() const override {
    if (wanted_.method == "residual")
      return "equal: the shared expert is the dense network, the experts add nothing yet";
    if (wanted_.method == "drop" && !equals_dense())
      return fmt::format("not equal by intent: {:g} of each expert's width is drawn anew", wanted_.drop_ratio);
    if (!equals_dense()) return fmt::format("equal but for the noise of {:g}", wanted_.noise);
    return halved_ ? "equal: half comes through the shared expert, half through copies"
                   : "equal: the weights of the chosen copies sum to 1";
  }

 private:
  /// Part g of G of the network's width.
  at::Tensor slice(const at::Tensor& dense, Part part, int64_t g) const {
    return dense.narrow(width_dim(part), g * sizes_.width, sizes_.width);
  }

  at::Tensor scaled_down(Part part, at::Tensor matrix) const {
    const double scale = static_cast<double>(wanted_.granularity) * (halved_ ? 0.5 : 1.0);
    return part == Part::kDown && scale != 1 ? matrix.to(torch::kFloat32) * scale : matrix;
  }

  at::Tensor noisy(const at::Tensor& dense, int64_t layer, Part part, int64_t e) const {
    return wanted_.noise > 0 ? with_noise(dense, wanted_.noise, wanted_.seed, layer, part, e) : dense;
  }

  at::Tensor dropped(const at::Tensor& dense, int64_t layer, Part part, int64_t e) const {
    auto draws = generator_of("permutation", layer, e, Part::kGate);  // the same in all three matrices
    const at::Tensor order = torch::randperm(dense_.width(), draws, torch::kLong);
    const auto count = static_cast<int64_t>(wanted_.drop_ratio * static_cast<double>(dense_.width()));
    const int64_t dim = width_dim(part);
    at::Tensor matrix = dense.index_select(dim, order).to(torch::kFloat32);
    if (count == 0) return matrix;
    auto positions = generator_of("drop", layer, e, wanted_.drop_independent ? part : Part::kGate);
    const at::Tensor places = torch::randperm(dense_.width(), positions, torch::kLong).narrow(0, 0, count);
    const at::Tensor replaced = matrix.index_select(dim, places);
    auto numbers = generator_of("drop numbers", layer, e, part);
    const at::Tensor fresh = torch::randn(replaced.sizes(), numbers, torch::kFloat32);
    return matrix.index_copy_(dim, places, fresh * replaced.std() + replaced.mean());
  }

  static int64_t width_dim(Part part) { return part == Part::kDown ? 1 : 0; }

  at::Generator generator_of(const char* use, int64_t layer, int64_t e, Part part) const {
    return matrix_generator(wanted_.seed, use, layer, e, part);
  }

  Upcycling wanted_;
  DenseFfn dense_;
  bool halved_;  // the other half comes through the shared expert
  SparseSizes sizes_;
};

}  // namespace

DenseFfn::DenseFfn(std::shared_ptr<const formats::Checkpoint> checkpoint) : checkpoint_(std::move(checkpoint)) {
  const std::string where = checkpoint_->path().string();
  while (checkpoint_->contains(dense_name(layers_, Part::kGate))) ++layers_;
  MOESAIC_CHECK(layers_ > 0, DataError, "{}: has no tensor '{}'", where, dense_name(0, Part::kGate));
  const auto shape = checkpoint_->shape(dense_name(0, Part::kGate));
  MOESAIC_CHECK(shape.size() == 2, DataError, "{}: {}: got {}, expected [f, d]", where, dense_name(0, Part::kGate),
                shape_text(shape));
  width_ = {shape[0], shape[1]};
}

const at::Tensor& DenseFfn::matrix(int64_t layer, Part part) {
  const std::string name = dense_name(layer, part);
  if (name == name_) return last_;
  last_ = torch::empty(checkpoint_->shape(name), checkpoint_->dtype(name));
  checkpoint_->read_into(name, last_);
  name_ = name;
  return last_;
}

at::Tensor drawn_rows(const Upcycling& wanted, const char* use, int64_t layer, int64_t rows, int64_t model_width) {
  auto generator = make_generator(derive_seed(wanted.seed, use, static_cast<uint64_t>(layer)));
  return wanted.router_init_std * torch::randn({rows, model_width}, generator, torch::kFloat32);
}

at::Tensor with_noise(const at::Tensor& matrix, double std, uint64_t seed, int64_t layer, Part part, int64_t number) {
  auto generator = matrix_generator(seed, "noise", layer, number, part);
  return matrix.to(torch::kFloat32) + std * torch::randn(matrix.sizes(), generator, torch::kFloat32);
}

at::Tensor silent_shared(int64_t model_width, Part part) {
  return part == Part::kDown ? torch::zeros({model_width, 1}) : torch::zeros({1, model_width});
}

std::unique_ptr<Experts> make_copies(const Upcycling& wanted, const SparseFamily& family,
                                     std::shared_ptr<const formats::Checkpoint> base) {
  return std::make_unique<Copies>(wanted, family, std::move(base));
}

}  // namespace moesaic::exporting
