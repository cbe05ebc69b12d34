// How fast own kernels and the library multiply here.
#pragma once
#include <cstdint>
#include <vector>

namespace moesaic::nn {

struct ProductShape {
  int64_t rows, in, out;
  bool back;  // g W instead of x W^T
};
struct ProductSpeed {
  ProductShape shape;
  double own = 0, library = 0;  // GFLOP/s in float32, the best of three interleaved rounds
};
/// Multiplies each shape with the threads that are set. products() is as before.
std::vector<ProductSpeed> measure_products(const std::vector<ProductShape>& shapes);

/// The geometric mean of own / library.
double advantage(const std::vector<ProductSpeed>& speeds);

}  // namespace moesaic::nn
