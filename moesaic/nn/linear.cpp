#include "moesaic/nn/linear.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::nn {

LinearImpl::LinearImpl(torch::Tensor w, torch::Tensor b) {
  weight = register_parameter("weight", std::move(w), /*requires_grad=*/false);
  if (b.defined()) bias = register_parameter("bias", std::move(b), /*requires_grad=*/false);
}

LinearGroup::LinearGroup(int64_t in, std::vector<int64_t> outs, bool bias, const torch::TensorOptions& options)
    : in_(in), outs_(std::move(outs)) {
  const int64_t total = std::accumulate(outs_.begin(), outs_.end(), int64_t{0});
  weight_ = torch::empty({total, in}, options);
  if (bias) bias_ = torch::empty({total}, options);
  int64_t row = 0;
  for (int64_t out : outs_) {
    members_.emplace_back(Linear(weight_.narrow(0, row, out), bias ? bias_.narrow(0, row, out) : torch::Tensor()));
    row += out;
  }
}

int64_t LinearGroup::column(int64_t index) const {
  return std::accumulate(outs_.begin(), outs_.begin() + index, int64_t{0});
}

torch::Tensor LinearGroup::base_forward(const torch::Tensor& x) const {
  if (quantized()) {
    MOESAIC_CHECK(!(torch::GradMode::is_enabled() && x.requires_grad()), UsageError,
                  "int8 weights can't be trained through: got quantize int8 while training, expected float weights");
    return linear_rows_int8(x, quantized_, scales_, bias_);
  }
  if (members_.front()->weight.requires_grad()) {
    std::vector<torch::Tensor> outputs;
    for (const Linear& member : members_) outputs.push_back(at::linear(x, member->weight, member->bias));
    return outputs.size() == 1 ? outputs.front() : torch::cat(outputs, 1);
  }
  return linear_rows(x, weight_, bias_);
}

torch::Tensor LinearGroup::forward(const torch::Tensor& x, ForwardContext& context) {
  if (adapter && !AdapterDisabled::disabled()) return adapter->forward(x, *this, context);
  return base_forward(x);
}

void LinearGroup::quantize_int8() {
  std::tie(quantized_, scales_) = quantize_rows_int8(weight_);
  weight_ = torch::Tensor();
  for (Linear& member : members_) member->weight.set_data(torch::empty({0}, member->weight.options()));
}

}  // namespace moesaic::nn
