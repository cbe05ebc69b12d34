// Gradients against central differences, in float64.
#pragma once
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <vector>

namespace moesaic::test {

/// Checks d/dx_i sum(w * f(x)) of every element of every input (float64, requires_grad) against
/// (f(x + h) - f(x - h)) / 2h, for one fixed random w. Error of the differences: O(h^2) = 1e-10 and 1e-16 / h = 1e-11.
inline void expect_gradients_match(const std::function<torch::Tensor(const std::vector<torch::Tensor>&)>& f,
                                   const std::vector<torch::Tensor>& inputs, double tolerance = 1e-7) {
  constexpr double kStep = 1e-5;
  const torch::Tensor y = f(inputs);
  const torch::Tensor w = torch::randn_like(y);
  const auto gradients = torch::autograd::grad({(y * w).sum()}, inputs);
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < inputs.size(); ++i) {
    torch::Tensor expected = torch::empty(inputs[i].sizes(), torch::kFloat64);
    double* data = inputs[i].data_ptr<double>();
    for (int64_t j = 0; j < inputs[i].numel(); ++j) {
      const double value = data[j];
      data[j] = value + kStep;
      const double above = (f(inputs) * w).sum().item<double>();
      data[j] = value - kStep;
      const double below = (f(inputs) * w).sum().item<double>();
      data[j] = value;
      expected.view(-1)[j] = (above - below) / (2 * kStep);
    }
    const double error = (gradients[i] - expected).abs().max().item<double>();
    EXPECT_LT(error, tolerance * std::max(1.0, expected.abs().max().item<double>())) << "input " << i;
  }
}

/// Checks d/dt f(theta + t v) at 0 of all parameters theta at once (float64), v random, against
/// (f(theta + h v) - f(theta - h v)) / 2h.
inline void expect_slope_matches(const std::function<torch::Tensor()>& f, std::vector<torch::Tensor> parameters) {
  constexpr double kStep = 1e-6;
  std::vector<torch::Tensor> directions;
  for (auto& p : parameters) {
    p.requires_grad_(true);
    directions.push_back(torch::randn_like(p).detach());
  }
  f().backward();
  torch::NoGradGuard no_grad;
  double slope = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    // An expert that no row chose has none.
    if (parameters[i].grad().defined()) slope += (parameters[i].grad() * directions[i]).sum().item<double>();
  }
  auto at = [&](double t) {
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].add_(directions[i], t);
    const double value = f().item<double>();
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].sub_(directions[i], t);
    return value;
  };
  const double expected = (at(kStep) - at(-kStep)) / (2 * kStep);
  EXPECT_NEAR(slope, expected, 1e-6 * std::max(1.0, std::abs(expected)));
}

/// Largest |a - b| over the largest |b|.
inline double relative_error(const torch::Tensor& a, const torch::Tensor& b) {
  const torch::Tensor x = a.detach().to(torch::kFloat64), y = b.detach().to(torch::kFloat64);
  return ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item<double>();
}

/// A float64 leaf that wants a gradient.
inline torch::Tensor leaf(const torch::Tensor& values) { return values.to(torch::kFloat64).requires_grad_(true); }

}  // namespace moesaic::test
