// The CPU kernels' raw interface: one table of functions per instruction set. Includes nothing but fixed-width
// integers: see CMakeLists.txt.
#pragma once
#include <cstdint>

namespace moesaic::nn {

enum class GluKind { kSilu, kGeluTanh, kRelu };  // kRelu has no kernel here

/// Terms of a row of activations that share a scale in 8 bits.
constexpr int64_t kInt8Block = 32;

/// The keys and values of one head, and what each of some rows sees of them: row n is at the position `position` + n.
struct SeenKeys {
  const float *keys, *values;  // [count, k], rows `stride` apart
  int64_t stride, count, k;
  int64_t position;
  bool causal;     // no key behind the row's own position
  int64_t window;  // causal: that many keys up to its own; else as many before it and `behind` behind it; 0 = all
  int64_t behind;
  float scale, softcap;
  const float* bias;  // [rows, count], rows `bias_stride` apart, or null
  int64_t bias_stride;
};

/// Every function works on the rows or columns [begin, end) it is given, so that the caller can split the work over
/// threads. All tensors are float32 and contiguous along their last axis unless said.
struct KernelTable {
  /// y[m, o] = x[m] . w[o] + bias[o] for o in [begin, end). x: [rows, in], w: [out, in], y: [rows, out]; bias may be
  /// null.
  void (*gemv_f32)(const float* x, int64_t rows, const float* w, const float* bias, float* y, int64_t in, int64_t out,
                   int64_t begin, int64_t end);
  /// The same with bfloat16 weights (their raw bits).
  void (*gemv_bf16)(const float* x, int64_t rows, const uint16_t* w, const float* bias, float* y, int64_t in,
                    int64_t out, int64_t begin, int64_t end);
  /// y[m, o] = onto[m, o] + sum_k x[m, k] W(k, o) for o in [begin, end) and k < depth, where W(k, o) is w[o, k], or
  /// w[k, o] when `back`: x W^T and gy W. x: [rows, depth], y and onto: [rows, ..], w, each with a stride of its rows.
  /// onto: y itself, a bias with the stride 0, or null. Sums up to 288 terms at a time, in order, for every row alike:
  /// its bits don't depend on the rows beside it.
  void (*gemm_f32)(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride, bool back,
                   const float* onto, int64_t onto_stride, float* y, int64_t y_stride, int64_t depth, int64_t begin,
                   int64_t end);
  /// q[m] = round(x[m] / x_scales[m]), x_scales[m] = max |x[m]| / 32767, for m in [begin, end). x: [rows, in]; q:
  /// [rows, q_stride], zero behind `in`.
  void (*quantize_int16)(const float* x, int16_t* q, int64_t q_stride, float* x_scales, int64_t in, int64_t begin,
                         int64_t end);
  /// y[m, o] = scales[o] x_scales[m] (x[m] . w[o]) + bias[o], products of integers: int16 rows (their rounding is far
  /// below that of the weights) times int8 weights in [-127, 127].
  /// x: [rows, x_stride] with an even x_stride, zero behind `in`.
  void (*gemv_int8)(const int16_t* x, int64_t x_stride, const float* x_scales, int64_t rows, const int8_t* w,
                    const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin,
                    int64_t end);
  /// The same for many rows, to the last bit.
  void (*gemm_int8)(const int16_t* x, int64_t x_stride, const float* x_scales, int64_t rows, const int8_t* w,
                    const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin,
                    int64_t end);
  /// Activations in 8 bits for gemm_blocks: q = round(x / s) with s = max |x| / 127 of each block of kInt8Block terms
  /// of a row, for m in [begin, end). x: [rows, in]; q: [rows, B kInt8Block], zero behind `in`; x_scales, offsets:
  /// [rows, B], offset = -128 times the sum of the block's q.
  void (*quantize_blocks)(const float* x, int8_t* q, float* x_scales, int32_t* offsets, int64_t in, int64_t begin,
                          int64_t end);
  /// y[m, o] = scales[o] sum_b x_scales[m, b] (q[m, b] . w[o, b]) + bias[o]: products of integers, exact in a block,
  /// and the same for a row whatever is beside it. Fast in the AVX512 table alone. Shapes as above.
  void (*gemm_blocks)(const int8_t* q, const float* x_scales, const int32_t* offsets, int64_t rows, const int8_t* w,
                      const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin,
                      int64_t end);
  /// q[o] = round(w[o] / scales[o]), scales[o] = max |w[o]| / 127, for o in [begin, end). w, q: [out, in].
  void (*quantize_int8)(const float* w, int8_t* q, float* scales, int64_t in, int64_t begin, int64_t end);

  /// u[n] = scale a x[n]. x: [N, d], a: [rank, d], u: [N, rank]; rows of x and u have strides.
  void (*thin_dots)(const float* x, int64_t x_stride, const float* a, int64_t rank, int64_t d, float scale, float* u,
                    int64_t u_stride, int64_t begin, int64_t end);
  /// y[n] += scale g[n] a. g: [N, rank], a: [rank, d], y: [N, d].
  void (*thin_add)(const float* g, int64_t g_stride, const float* a, int64_t rank, int64_t d, float scale, float* y,
                   int64_t y_stride, int64_t begin, int64_t end);
  /// sums += scale g^T x over the rows [begin, end). g: [N, rank], x: [N, d], sums: [rank, d].
  void (*thin_outer)(const float* g, int64_t g_stride, const float* x, int64_t x_stride, int64_t rank, int64_t d,
                     float scale, float* sums, int64_t begin, int64_t end);

  /// y = x rstd (weight + offset), rstd = 1 / sqrt(mean(x^2) + eps). x, y: [rows, d]; rstd: [rows].
  void (*rms_norm)(const float* x, const float* weight, float offset, float eps, float* y, float* rstd, int64_t d,
                   int64_t begin, int64_t end);
  /// dx = rstd (g - xhat mean(g xhat)),  g = dy (weight + offset), xhat = x rstd.
  void (*rms_norm_backward)(const float* dy, const float* x, const float* weight, float offset, const float* rstd,
                            float* dx, int64_t d, int64_t begin, int64_t end);

  /// y = act(g) u. gate_up: [rows, 2 f], g its first half; y: [rows, f].
  void (*glu)(const float* gate_up, float* y, int64_t f, GluKind kind, int64_t begin, int64_t end);
  /// d_gate_up = [dy u act'(g), dy act(g)].
  void (*glu_backward)(const float* dy, const float* gate_up, float* d_gate_up, int64_t f, GluKind kind, int64_t begin,
                       int64_t end);

  /// Rotates pairs (i, i + k/2) of every head by the row's angles: y = (x1 cos - x2 sin, x2 cos + x1 sin), `sign` times
  /// the angle. x, y: [rows, heads, k] with row strides; cos, sin: [rows, k/2]. y may be x.
  void (*rope)(const float* x, int64_t x_stride, float* y, int64_t y_stride, const float* cos, const float* sin,
               float sign, int64_t heads, int64_t k, int64_t begin, int64_t end);

  /// One query position of `group` heads that share one KV head: out = softmax(scale q K^T + bias) V, scores
  /// soft-capped when softcap > 0. q, out: [group, k]; keys, values: [length] rows of k, `stride` apart; bias: [group]
  /// rows of `length`, `bias_stride` apart, or null; scores: scratch [group, length].
  void (*attend)(const float* q, const float* keys, const float* values, int64_t stride, int64_t length, int64_t group,
                 int64_t k, float scale, float softcap, const float* bias, int64_t bias_stride, float* scores,
                 float* out);

  /// out[n] = sum_j softmax_j(score_nj) v_j, score = softcap tanh(scale q_n . k_j / softcap) + bias[n, j], over the
  /// keys that row n sees; the softcap only when above 0. log_sums, where not null: log sum_j exp(score_nj) of each
  /// row. q, out: [rows, k]. A row's bits don't depend on the rows beside it.
  void (*attend_rows)(const float* q, int64_t q_stride, int64_t rows, const SeenKeys& seen, float* out,
                      int64_t out_stride, float* log_sums, int64_t log_sums_stride);
  /// The gradients of q, into dq, and of keys and values, onto dk and dv (of k's and v's layout).
  void (*attend_backward)(const float* q, int64_t q_stride, const float* out, const float* d_out, int64_t out_stride,
                          const float* log_sums, int64_t log_sums_stride, int64_t rows, const SeenKeys& seen, float* dq,
                          int64_t dq_stride, float* dk, float* dv);
};

extern const KernelTable kGenericKernels;
/// nullptr members where the compiler's target has no AVX2.
extern const KernelTable kAvx2Kernels;
/// The same for AVX512 (F, BW, DQ, VL) with VNNI.
extern const KernelTable kAvx512Kernels;

/// The table for what ATen computes with here (ATEN_CPU_CAPABILITY: default, avx2, avx512).
const KernelTable& kernels();

}  // namespace moesaic::nn
