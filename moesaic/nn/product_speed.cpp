#include "moesaic/nn/product_speed.h"

#include <chrono>

#include "moesaic/nn/kernels.h"

namespace moesaic::nn {
namespace {

constexpr int kRounds = 3;

/// GFLOP/s of one product.
double speed_of(const ProductShape& shape, const torch::Tensor& x, const torch::Tensor& weight, torch::Tensor& y) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  if (shape.back) {
    back_into(y, x, weight);
  } else {
    linear_into(y, x, weight, {});
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return 2e-9 * static_cast<double>(shape.rows * shape.in * shape.out) / seconds;
}

}  // namespace

std::vector<ProductSpeed> measure_products(const std::vector<ProductShape>& shapes) {
  const torch::NoGradGuard no_grad;
  const Products before = products();
  std::vector<ProductSpeed> speeds;
  for (const ProductShape& shape : shapes) {
    const torch::Tensor weight = torch::ones({shape.out, shape.in});
    const torch::Tensor x = torch::ones({shape.rows, shape.back ? shape.out : shape.in});
    torch::Tensor y = torch::empty({shape.rows, shape.back ? shape.in : shape.out});
    ProductSpeed& speed = speeds.emplace_back(shape);
    for (int round = 0; round <= kRounds; ++round) {  // the first warms up
      for (const auto [products, best] :
           {std::pair(Products::kOwn, &speed.own), {Products::kLibrary, &speed.library}}) {
        set_products(products);
        const double found = speed_of(shape, x, weight, y);
        if (round > 0) *best = std::max(*best, found);
      }
    }
  }
  set_products(before);
  return speeds;
}

double advantage(const std::vector<ProductSpeed>& speeds) {
  double sum = 0;
  for (const ProductSpeed& speed : speeds) sum += std::log(speed.own / speed.library);
  return std::exp(sum / static_cast<double>(speeds.size()));
}

}  // namespace moesaic::nn
