#include "moesaic/nn/linear.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/split.h"

namespace moesaic::nn {

LinearImpl::LinearImpl(torch::Tensor w, torch::Tensor b) {
  weight = register_parameter("weight", std::move(w), /*requires_grad=*/false);
  if (b.defined()) bias = register_parameter("bias", std::move(b), /*requires_grad=*/false);
}

LinearGroup::LinearGroup(int64_t in, std::vector<int64_t> outs, bool bias, const torch::TensorOptions& options,
                         std::vector<int64_t> heads)
    : in_(in), outs_(std::move(outs)), heads_(std::move(heads)), inputs_(outs_.size()), outputs_(outs_.size()) {
  heads_.resize(outs_.size(), 0);
  const int64_t total = std::accumulate(outs_.begin(), outs_.end(), int64_t{0});
  weight_ = torch::empty({total, in}, options);
  if (bias) bias_ = torch::empty({total}, options);
  int64_t row = 0;
  // Autograd's views would keep the whole matrix when its numbers are taken from them.
  auto rows = [&](const torch::Tensor& whole, int64_t out) { return whole.narrow(0, row, out).variable_data(); };
  for (int64_t out : outs_) {
    members_.emplace_back(Linear(rows(weight_, out), bias ? rows(bias_, out) : torch::Tensor()));
    row += out;
  }
  matrix_ = dense_matrix(weight_);
}

int64_t LinearGroup::column(int64_t index) const {
  return std::accumulate(outs_.begin(), outs_.begin() + index, int64_t{0});
}

bool LinearGroup::scaled() const {
  auto filled = [](const ScaleSlot& slot) { return !slot.empty(); };
  return std::any_of(inputs_.begin(), inputs_.end(), filled) || std::any_of(outputs_.begin(), outputs_.end(), filled);
}

bool LinearGroup::trains() const {
  auto slot_trains = [](const ScaleSlot& slot) { return slot.trains(); };
  return (delta && delta->trains()) || std::any_of(inputs_.begin(), inputs_.end(), slot_trains) ||
         std::any_of(outputs_.begin(), outputs_.end(), slot_trains) ||
         std::any_of(members_.begin(), members_.end(),
                     [](const Linear& member) { return member->weight.requires_grad(); });
}

torch::Tensor LinearGroup::product(const torch::Tensor& x) const {
  MOESAIC_ASSERT(x.dim() == 2 && x.size(1) == in_);
  if (members_.front()->weight.requires_grad()) {
    std::vector<torch::Tensor> outputs;
    for (const Linear& member : members_) outputs.push_back(at::linear(x, member->weight, member->bias));
    return outputs.size() == 1 ? outputs.front() : torch::cat(outputs, 1);
  }
  return matrix_->product(x, bias_);
}

torch::Tensor LinearGroup::member_product(int64_t index, const torch::Tensor& x) const {
  const Linear& member = members_[index];
  if (member->weight.requires_grad()) return at::linear(x, member->weight, member->bias);
  return matrix_->outputs(column(index), outs_[index])->product(x, member->bias);
}

std::vector<torch::Tensor> LinearGroup::base_parts(const torch::Tensor& x, Pass& pass) const {
  const bool shared = std::any_of(inputs_.begin(), inputs_.end(), [](const ScaleSlot& slot) { return slot.empty(); });
  std::vector<torch::Tensor> parts(outs_.size());
  if (shared) parts = split_columns(product(x), outs_);
  for (size_t j = 0; j < outs_.size(); ++j) {
    if (!inputs_[j].empty()) parts[j] = member_product(static_cast<int64_t>(j), inputs_[j].apply(x, pass));
    if (outputs_[j].empty()) continue;
    const torch::Tensor y = heads_[j] > 0 ? parts[j].view({x.size(0), heads_[j], -1}) : parts[j];
    parts[j] = outputs_[j].apply(y, pass).reshape({x.size(0), outs_[j]});
  }
  return parts;
}

torch::Tensor LinearGroup::base(const torch::Tensor& x, Pass& pass) const {
  if (!scaled()) return product(x);
  const std::vector<torch::Tensor> parts = base_parts(x, pass);
  return parts.size() == 1 ? parts.front() : torch::cat(parts, 1);
}

torch::Tensor LinearGroup::forward(const torch::Tensor& x, Pass& pass) {
  return delta && !AdapterDisabled::disabled() ? delta->forward(x, *this, pass) : base(x, pass);
}

std::vector<torch::Tensor> LinearGroup::parts(const torch::Tensor& x, Pass& pass) {
  if (delta && !AdapterDisabled::disabled()) return split_columns(delta->forward(x, *this, pass), outs_);
  return base_parts(x, pass);
}

void LinearGroup::quantize_int8() {
  matrix_ = int8_matrix(weight_);
  weight_ = torch::Tensor();
  for (Linear& member : members_) member->weight.set_data(torch::empty({0}, member->weight.options()));
}

}  // namespace moesaic::nn
