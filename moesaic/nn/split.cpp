#include "moesaic/nn/split.h"

namespace moesaic::nn {
namespace {

std::vector<torch::Tensor> views(const torch::Tensor& x, const std::vector<int64_t>& widths) {
  std::vector<torch::Tensor> parts;
  int64_t column = 0;
  for (int64_t width : widths) {
    parts.push_back(x.narrow(1, column, width));
    column += width;
  }
  return parts;
}

struct SplitFunction : torch::autograd::Function<SplitFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                                                const std::vector<int64_t>& widths) {
    ctx->saved_data["widths"] = widths;
    ctx->saved_data["rows"] = x.size(0);
    ctx->set_materialize_grads(false);
    return views(x, widths);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const std::vector<int64_t> widths = ctx->saved_data["widths"].toIntVector();
    const int64_t rows = ctx->saved_data["rows"].toInt();
    torch::TensorOptions options;
    for (const auto& grad : grads) {
      if (grad.defined()) options = grad.options();
    }
    std::vector<torch::Tensor> parts;
    for (size_t i = 0; i < grads.size(); ++i) {
      parts.push_back(grads[i].defined() ? grads[i] : torch::zeros({rows, widths[i]}, options));
    }
    return {at::cat(parts, 1), {}};
  }
};

}  // namespace

std::vector<torch::Tensor> split_columns(const torch::Tensor& x, const std::vector<int64_t>& widths) {
  if (torch::GradMode::is_enabled() && x.requires_grad()) return SplitFunction::apply(x, widths);
  return views(x, widths);
}

}  // namespace moesaic::nn
