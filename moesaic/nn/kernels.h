// Products with few rows, as decoding needs them: near the memory's bandwidth.
#pragma once
#include <torch/torch.h>

#include "moesaic/nn/kernel_table.h"

namespace moesaic::nn {

/// A product rounds its rows as suits their number. While one of these lives, products of this thread without a
/// gradient on the CPU give a row the same bits whatever is beside it: kFew by kernels that read the weights once, for
/// up to some dozens of rows; kMany by the kernels for many, or by the library, which gets at least kRowsPerThread rows
/// a thread and then computes each alike. The two differ from each other in their last bits.
class AlikeRows {
 public:
  enum class Number { kAny, kFew, kMany };
  static constexpr int64_t kRowsPerThread = 16;

  explicit AlikeRows(Number number) : previous_(now()) { now() = number; }
  ~AlikeRows() { now() = previous_; }
  AlikeRows(const AlikeRows&) = delete;
  AlikeRows& operator=(const AlikeRows&) = delete;
  static Number& now() {
    thread_local Number value = Number::kAny;
    return value;
  }

 private:
  Number previous_;
};

/// Who multiplies matrices of many rows in float32 on the CPU: the kernels of this table, whose rows have the same bits
/// in any company and for any number of threads, or the library that PyTorch uses.
enum class Products { kOwn, kLibrary };
/// kOwn on processors with AVX2, until set otherwise.
Products products();
void set_products(Products products);

/// y = x W^T + b. x: [M, in]; weight: [out, in] of x's dtype; bias: [out] or undefined. Returns [M, out].
/// A few rows without autograd on the CPU go through an own GEMV that reads the weight once. Differentiable in x, and
/// in the weight where that requires a gradient.
torch::Tensor linear_rows(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias);
/// The same into y, without autograd. y: [M, out] of x's dtype.
void linear_into(torch::Tensor& y, const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias);

/// Whether a product of such numbers is slower than one in float32 with everything converted, which is then what
/// linear_rows and back_rows do inside: without AVX512, PyTorch's bfloat16 products take their generic paths, 9 GFLOP/s
/// for x W^T and 0.8 for g W, where this has 71 (AVX2, 1 thread, 1024 x 512 x 1536).
bool multiplies_wide(const torch::Tensor& x);

/// g W: [M, out] x [out, in] of one dtype. Without autograd.
torch::Tensor back_rows(const torch::Tensor& g, const torch::Tensor& weight);
/// The same into x [M, in].
void back_into(torch::Tensor& x, const torch::Tensor& g, const torch::Tensor& weight);

/// The products of a low-rank pair, without autograd: x, y: [N, d], u, g: [N, rank], a: [rank, d], where rows of all
/// but `a` may have strides. Ranks up to 16 in float32 on the CPU have kernels of their own, which run at the memory's
/// speed where a GEMM library packs matrices that are nearly empty.
///
/// x a^T: [N, rank].
torch::Tensor thin_dots(const torch::Tensor& x, const torch::Tensor& a);
/// y += scale g a.
void thin_add(const torch::Tensor& g, const torch::Tensor& a, double scale, torch::Tensor y);
/// scale g^T x: [rank, d], float32 where x is of half precision. `dots`, when given, becomes scale x a^T [N, rank] in
/// the same pass over x.
torch::Tensor thin_outer(const torch::Tensor& g, const torch::Tensor& x, double scale, const torch::Tensor& a = {},
                         torch::Tensor dots = {});

/// y = x (diag(scales) Q)^T + b. x: [M, in], any float dtype; quantized: int8 [out, in]; scales: float32 [out]; bias:
/// [out] or undefined. Returns [M, out] in x's dtype. No gradient: throws when x needs one.
torch::Tensor linear_rows_int8(const torch::Tensor& x, const torch::Tensor& quantized, const torch::Tensor& scales,
                               const torch::Tensor& bias);

/// int8 rows and their float32 scales: weight [out, in] ~ diag(scales) quantized, scale = max |row| / 127.
std::pair<torch::Tensor, torch::Tensor> quantize_rows_int8(const torch::Tensor& weight);

}  // namespace moesaic::nn
