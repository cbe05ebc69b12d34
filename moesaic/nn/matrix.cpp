#include "moesaic/nn/matrix.h"

#include "moesaic/nn/kernels.h"

namespace moesaic::nn {
namespace {

class DenseMatrix : public Matrix {
 public:
  explicit DenseMatrix(torch::Tensor weight) : weight_(std::move(weight)) {}
  torch::Tensor product(const torch::Tensor& x, const torch::Tensor& bias) const override {
    return linear_rows(x, weight_, bias);
  }
  torch::Tensor product_back(const torch::Tensor& gy) const override { return back_rows(gy, weight_); }
  std::shared_ptr<Matrix> outputs(int64_t begin, int64_t count) const override {
    return dense_matrix(weight_.narrow(0, begin, count));
  }

 private:
  torch::Tensor weight_;
};

class Int8Matrix : public Matrix {
 public:
  Int8Matrix(torch::Tensor rows, torch::Tensor scales) : rows_(std::move(rows)), scales_(std::move(scales)) {}

  torch::Tensor product(const torch::Tensor& x, const torch::Tensor& bias) const override {
    if (torch::GradMode::is_enabled() && x.requires_grad())
      return Product::apply(x, this, bias.defined() ? std::optional(bias) : std::nullopt);
    return linear_rows_int8(x, rows_, scales_, bias);
  }
  torch::Tensor product_back(const torch::Tensor& gy) const override { return back(gy, rows_, scales_); }
  std::shared_ptr<Matrix> outputs(int64_t begin, int64_t count) const override {
    return std::make_shared<Int8Matrix>(rows_.narrow(0, begin, count), scales_.narrow(0, begin, count));
  }

 private:
  static torch::Tensor back(const torch::Tensor& gy, const torch::Tensor& rows, const torch::Tensor& scales) {
    return back_rows(gy * scales.to(gy.scalar_type()), rows.to(gy.scalar_type()));
  }

  struct Product : torch::autograd::Function<Product> {
    static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                                 const Int8Matrix* matrix, const std::optional<torch::Tensor>& bias) {
      ctx->saved_data["rows"] = matrix->rows_;
      ctx->saved_data["scales"] = matrix->scales_;
      return linear_rows_int8(x, matrix->rows_, matrix->scales_, bias.value_or(torch::Tensor()));
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   const torch::autograd::variable_list& grads) {
      return {back(grads[0], ctx->saved_data["rows"].toTensor(), ctx->saved_data["scales"].toTensor()), {}, {}};
    }
  };

  torch::Tensor rows_, scales_;  // int8 [out, in], float32 [out]
};

}  // namespace

std::shared_ptr<Matrix> dense_matrix(torch::Tensor weight) { return std::make_shared<DenseMatrix>(std::move(weight)); }

std::shared_ptr<Matrix> int8_matrix(const torch::Tensor& weight) {
  auto [rows, scales] = quantize_rows_int8(weight);
  return std::make_shared<Int8Matrix>(std::move(rows), std::move(scales));
}

}  // namespace moesaic::nn
