#include "moesaic/nn/loss.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::nn {

int64_t cross_entropy_chunk_bytes(torch::Device device) {
  // Each chunk reads the whole head twice, so chunks must not be small: with a 49k vocabulary and 512 rows, 64 MiB cost
  // 1.25 times the bare products, 16 MiB 1.9 times. A GPU wants more rows to be full.
  return device.is_cuda() ? int64_t{256} << 20 : int64_t{64} << 20;
}

namespace {

struct LossAndGradients {
  torch::Tensor loss;             // scalar
  torch::Tensor hidden_gradient;  // [M, d] or undefined
  torch::Tensor weight_gradient;  // [V, d] or undefined
};

LossAndGradients compute(const torch::Tensor& hidden, const torch::Tensor& weight, const torch::Tensor& labels,
                         const torch::Tensor& row_weights, double softcap, double z_loss, bool want_hidden,
                         bool want_weight) {
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  const auto accumulate = hidden.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const auto options = hidden.options().dtype(accumulate);
  const int64_t row_bytes = vocabulary * static_cast<int64_t>(c10::elementSize(accumulate));
  const int64_t most = std::max<int64_t>(1, cross_entropy_chunk_bytes(hidden.device()) / row_bytes);
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  const int64_t chunk = (rows + chunks - 1) / chunks;  // of equal size

  LossAndGradients result;
  if (want_hidden) result.hidden_gradient = torch::empty_like(hidden);
  if (want_weight) result.weight_gradient = torch::zeros(weight.sizes(), options);
  const auto losses = torch::empty({rows}, options);
  const auto scale = row_weights.to(options);
  auto buffer = torch::empty({chunk, vocabulary}, hidden.options());

  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t count = std::min(chunk, rows - begin);
    const auto h = hidden.narrow(0, begin, count);
    const auto label = labels.narrow(0, begin, count).unsqueeze(1);  // [m, 1]
    auto z = buffer.narrow(0, 0, count);                             // [m, V]
    linear_into(z, h, weight, {});
    if (z.scalar_type() != accumulate) z = z.to(accumulate);
    torch::Tensor tanh;
    if (softcap > 0) {
      tanh = z.div_(softcap).tanh_().clone();
      z.mul_(softcap);
    }
    const auto largest = z.amax(1, /*keepdim=*/true);
    z.sub_(largest);
    const auto label_logits = z.gather(1, label).squeeze(1);
    const auto sums = z.exp_().sum(1);  // summed pairwise, which log_softmax's kernel does not do
    auto loss = losses.narrow(0, begin, count);
    loss.copy_(sums.log() - label_logits);
    torch::Tensor pull;  // of the z-loss on every logit, times its probability
    if (z_loss > 0) {
      const auto log_sum = sums.log() + largest.squeeze(1);
      loss.add_(log_sum.square(), z_loss);
      pull = log_sum.mul_(2 * z_loss).add_(1);
    }
    if (!want_hidden && !want_weight) continue;

    // dL/dz of a row of weight 1: (1 + 2 z_loss lse) softmax(z) - onehot(label); the row's weight goes to the narrow
    // side of each product.
    z.div_(sums.unsqueeze(1));
    if (pull.defined()) z.mul_(pull.unsqueeze(1));
    z.scatter_add_(1, label, torch::full({count, 1}, -1.0, options));
    if (softcap > 0) z.mul_(tanh.square_().neg_().add_(1));
    const auto w = scale.narrow(0, begin, count).unsqueeze(1);
    // In half precision the logits' buffer takes their gradient.
    const auto dz = z.scalar_type() == hidden.scalar_type() ? z : buffer.narrow(0, 0, count).copy_(z);
    if (want_hidden) {
      auto out = result.hidden_gradient.narrow(0, begin, count);
      back_into(out, dz, weight);
      out.mul_(w);
    }
    if (want_weight) {
      const auto weighted = (h * w).to(hidden.scalar_type());
      if (hidden.scalar_type() == accumulate) {
        result.weight_gradient.addmm_(dz.t(), weighted);
      } else {
        result.weight_gradient.add_(at::mm(dz.t(), weighted));
      }
    }
  }
  result.loss = (losses * scale).sum();
  return result;
}

class ChunkedCrossEntropy : public torch::autograd::Function<ChunkedCrossEntropy> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& hidden,
                               const torch::Tensor& weight, const torch::Tensor& labels,
                               const torch::Tensor& row_weights, double softcap, double z_loss) {
    const auto result =
        compute(hidden, weight, labels, row_weights, softcap, z_loss, hidden.requires_grad(), weight.requires_grad());
    context->save_for_backward({result.hidden_gradient, result.weight_gradient});
    context->saved_data["weight_dtype"] = weight.scalar_type();
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list outputs) {
    const auto saved = context->get_saved_variables();
    const auto& factor = outputs[0];
    const auto dtype = context->saved_data["weight_dtype"].toScalarType();
    return {saved[0].defined() ? saved[0] * factor.to(saved[0].scalar_type()) : torch::Tensor(),
            saved[1].defined() ? (saved[1] * factor).to(dtype) : torch::Tensor(),
            {},
            {},
            {},
            {}};
  }
};

}  // namespace

torch::Tensor chunked_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& weight,
                                    const torch::Tensor& labels, const torch::Tensor& row_weights, double softcap,
                                    double z_loss) {
  MOESAIC_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1), ShapeError,
                "cross entropy: hidden [{}] and head [{}] must be [M, d] and [V, d]", fmt::join(hidden.sizes(), ", "),
                fmt::join(weight.sizes(), ", "));
  MOESAIC_CHECK(labels.dim() == 1 && row_weights.dim() == 1 && labels.size(0) == hidden.size(0) &&
                    row_weights.size(0) == hidden.size(0),
                ShapeError, "cross entropy: got {} rows, {} labels and {} row weights", hidden.size(0), labels.numel(),
                row_weights.numel());
  if (torch::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad())) {
    return ChunkedCrossEntropy::apply(hidden, weight, labels, row_weights, softcap, z_loss);
  }
  return compute(hidden, weight, labels, row_weights, softcap, z_loss, false, false).loss;
}

}  // namespace moesaic::nn
