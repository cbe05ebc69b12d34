// The kernels' code, compiled once per instruction set into the table MOESAIC_KERNELS. Vectors of 8 floats, 16 with
// AVX512, are the compiler's own (GCC and Clang vector extensions); where the target's registers are narrower the
// compiler splits them.
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "moesaic/nn/kernel_table.h"

namespace moesaic::nn {
namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
constexpr int64_t kLine = 16;  // floats of a cache line

/// A number as a type.
template <int N>
struct Constant {
  static constexpr int value = N;
};

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const uint16_t* p) {  // bfloat16: the upper half of a float
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
}
inline float load_one(const float* p) { return *p; }
inline float load_one(const uint16_t* p) {
  uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats splat(float value) { return Floats{} + value; }
inline Floats select(Ints mask, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((mask & reinterpret_cast<Ints>(yes)) | (~mask & reinterpret_cast<Ints>(no)));
}
#ifdef __AVX512F__
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline int32_t sum(Ints v) { return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v)); }
inline float max(Floats v) { return _mm512_reduce_max_ps(v); }
#else
inline float sum(Floats v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}
inline int32_t sum(Ints v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}
inline float max(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
#endif

/// e^x within 2 ulp: x = n ln2 + r, |r| <= ln2 / 2, e^r by its Taylor polynomial of degree 7. Saturates at both ends.
inline Floats exp(Floats x) {
  x = select(x > 88.0f, splat(88.0f), x);
  x = select(x < -87.0f, splat(-87.0f), x);
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats n = x * 1.44269504f + magic - magic;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * reinterpret_cast<Floats>(exponent);
}
inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }
inline Floats tanh(Floats x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

/// Calls body(offset, count) for each piece of up to kLanes elements; the last may be shorter.
template <class Body>
inline void for_pieces(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}
inline Floats load_piece(const float* p, int64_t count) {
  if (count == kLanes) return load(p);
#ifdef __AVX512F__
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  Floats v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store_piece(float* p, Floats v, int64_t count) {
  if (count == kLanes) return store(p, v);
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// GEMV ---------------------------------------------------------------------------------------------------------------

constexpr int64_t kChains = 4, kStep = kChains * kLanes;  // sums of a dot product that run side by side

/// M rows of x times one row of w, which is read once. One weight row at a time: a single stream from memory is faster
/// than several side by side.
template <int M, class W>
inline void dot_row(const float* x, const W* w, int64_t in, const float* bias, float* y, int64_t out) {
  constexpr int64_t kAhead = 2048 / sizeof(W), kLine = 64 / sizeof(W);  // of what is fetched before it is wanted
  Floats acc[M][kChains] = {};
  int64_t i = 0;
  for (; i + kStep <= in; i += kStep) {
    for (int64_t line = 0; line < kStep; line += kLine) __builtin_prefetch(w + i + kAhead + line);
    for (int64_t c = 0; c < kChains; ++c) {
      const Floats ws = load(w + i + c * kLanes);
      for (int m = 0; m < M; ++m) acc[m][c] += load(x + m * in + i + c * kLanes) * ws;
    }
  }
  for (; i + kLanes <= in; i += kLanes) {
    const Floats ws = load(w + i);
    for (int m = 0; m < M; ++m) acc[m][0] += load(x + m * in + i) * ws;
  }
  for (int m = 0; m < M; ++m) {
    float total = sum((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
    for (int64_t j = i; j < in; ++j) total += x[m * in + j] * load_one(w + j);
    y[m * out] = bias ? total + *bias : total;
  }
}

/// M rows of x times O rows of w: every sum is made as dot_row makes it, to the last bit, but chain after chain, so
/// that a tile's sums fill the registers.
template <int M, int O, class W>
inline void dot_tile(const float* x, const W* w, int64_t in, const float* bias, float* y, int64_t out) {
  const int64_t steps = in / kStep * kStep, vectors = in / kLanes * kLanes;
  Floats chains[kChains][M][O];
  for (int64_t c = 0; c < kChains; ++c) {
    Floats acc[M][O] = {};
    auto add = [&](int64_t i) {
      Floats ws[O];
      for (int o = 0; o < O; ++o) ws[o] = load(w + o * in + i);
      for (int m = 0; m < M; ++m) {
        const Floats xs = load(x + m * in + i);
        for (int o = 0; o < O; ++o) acc[m][o] += xs * ws[o];
      }
    };
    for (int64_t i = c * kLanes; i < steps; i += kStep) add(i);
    for (int64_t i = steps; c == 0 && i < vectors; i += kLanes) add(i);
    for (int m = 0; m < M; ++m) {
      for (int o = 0; o < O; ++o) chains[c][m][o] = acc[m][o];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int o = 0; o < O; ++o) {
      float total = sum((chains[0][m][o] + chains[1][m][o]) + (chains[2][m][o] + chains[3][m][o]));
      for (int64_t j = vectors; j < in; ++j) total += x[m * in + j] * load_one(w + o * in + j);
      y[m * out + o] = bias ? total + bias[o] : total;
    }
  }
}

/// All rows of x times O rows of w.
template <int O, class W>
inline void dot_rows(const float* x, int64_t rows, const W* w, int64_t in, const float* bias, float* y, int64_t out) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) dot_tile<4, O>(x + m * in, w, in, bias, y + m * out, out);
  if (rows - m == 3) dot_tile<3, O>(x + m * in, w, in, bias, y + m * out, out);
  if (rows - m == 2) dot_tile<2, O>(x + m * in, w, in, bias, y + m * out, out);
  if (rows - m == 1) dot_tile<1, O>(x + m * in, w, in, bias, y + m * out, out);
}

template <class W>
inline void gemv(const float* x, int64_t rows, const W* w, const float* bias, float* y, int64_t in, int64_t out,
                 int64_t begin, int64_t end) {
  constexpr int kTile = 3;  // rows of w, with 4 of x, whose sums fill 16 registers
  int64_t o = begin;
  if (rows > 2) {
    for (; o + kTile <= end; o += kTile) {
      dot_rows<kTile>(x, rows, w + o * in, in, bias ? bias + o : nullptr, y + o, out);
    }
  }
  for (; o < end; ++o) {
    const float* offset = bias ? bias + o : nullptr;
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) dot_row<2>(x + m * in, w + o * in, in, offset, y + m * out + o, out);
    if (m < rows) dot_row<1>(x + m * in, w + o * in, in, offset, y + m * out + o, out);
  }
}

void gemv_f32(const float* x, int64_t rows, const float* w, const float* bias, float* y, int64_t in, int64_t out,
              int64_t begin, int64_t end) {
  gemv(x, rows, w, bias, y, in, out, begin, end);
}
void gemv_bf16(const float* x, int64_t rows, const uint16_t* w, const float* bias, float* y, int64_t in, int64_t out,
               int64_t begin, int64_t end) {
  gemv(x, rows, w, bias, y, in, out, begin, end);
}

// GEMM ---------------------------------------------------------------------------------------------------------------

// A tile's sums fill the registers, a packed panel the first cache, and a block of x's rows most of the second.
#ifdef __AVX512F__
constexpr int kGemmRows = 12;
#else
constexpr int kGemmRows = 6;
#endif
constexpr int64_t kGemmColumns = 2 * kLanes, kGemmDepth = 288, kGemmGroup = 128, kGemmBlock = 504;

/// The largest of the pieces, of at most `most` terms and about equal, into which `depth` terms are cut.
inline int64_t piece_of(int64_t depth, int64_t most) {
  const int64_t pieces = (depth + most - 1) / most;
  return (depth + 8 * pieces - 1) / (8 * pieces) * 8;
}

typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));  // 8 pairs
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

/// to[j, i] = row(i)[j] for 8 rows and columns of 4 bytes; rows of `to` lie `stride` floats apart.
template <class Row>
inline void transpose_eight(const Row& row, float* to, int64_t stride = kGemmColumns) {
  Eight r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = row(i);
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * j + 1] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const Eight low = __builtin_shufflevector(r[j], r[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight high = __builtin_shufflevector(r[j], r[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
    __builtin_memcpy(to + j * stride, &low, sizeof low);
    __builtin_memcpy(to + (j + 4) * stride, &high, sizeof high);
  }
}

/// `columns` rows of w at `depth` terms: panel [depth, kGemmColumns], zero where w ends.
inline void pack_rows(const float* w, int64_t stride, int64_t columns, int64_t depth, float* panel) {
  for (int64_t c = 0; c < kGemmColumns; c += 8) {
    int64_t k = 0;
    for (; c + 8 <= columns && k + 8 <= depth; k += 8) {
      transpose_eight([&](int i) { return load_as<Eight>(w + (c + i) * stride + k); }, panel + k * kGemmColumns + c);
    }
    for (; k < depth; ++k) {
      for (int64_t i = c; i < c + 8; ++i) panel[k * kGemmColumns + i] = i < columns ? w[i * stride + k] : 0;
    }
  }
}

/// One row of w at `columns` columns, into every panel's row, `apart` floats apart.
inline void pack_columns(const float* w, int64_t columns, int64_t apart, float* panels) {
  for (; columns >= kGemmColumns; columns -= kGemmColumns, w += kGemmColumns, panels += apart) {
    store(panels, load(w));
    store(panels + kLanes, load(w + kLanes));
  }
  for (int64_t c = 0; columns > 0 && c < kGemmColumns; ++c) panels[c] = c < columns ? w[c] : 0;
}

/// Part `part` of `parts` of the rows that are packed next, on their way into the cache; `width` and `stride` in bytes.
inline void fetch(const void* from, int64_t stride, int64_t rows, int64_t width, int64_t part, int64_t parts) {
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    const char* bytes = static_cast<const char*>(from) + row * stride;
    for (int64_t i = 0; i < width; i += 64) __builtin_prefetch(bytes + i);
  }
}

/// R rows of x times a panel, onto `before` (of y's layout; null: zeros) into y [R, columns].
template <int R>
inline void gemm_tile(const float* x, int64_t x_stride, const float* panel, int64_t depth, const float* before,
                      int64_t before_stride, float* y, int64_t y_stride, int64_t columns) {
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < kGemmColumns; i += kLine) __builtin_prefetch(y + r * y_stride + i, /*write=*/1);
  }
  Floats acc[R][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Floats first = load(panel + k * kGemmColumns), second = load(panel + k * kGemmColumns + kLanes);
    for (int r = 0; r < R; ++r) {
      acc[r][0] += x[r * x_stride + k] * first;
      acc[r][1] += x[r * x_stride + k] * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t left = columns - half * kLanes, count = left < kLanes ? left : kLanes;
      if (count <= 0) break;
      if (before) acc[r][half] += load_piece(before + r * before_stride + half * kLanes, count);
      store_piece(y + r * y_stride + half * kLanes, acc[r][half], count);
    }
  }
}

void gemm_f32(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride, bool back,
              const float* onto, int64_t onto_stride, float* y, int64_t y_stride, int64_t depth, int64_t begin,
              int64_t end) {
  constexpr int64_t kPanel = kGemmDepth * kGemmColumns;
  alignas(64) float panels[kGemmDepth * kGemmGroup];
  const int64_t piece = piece_of(depth, kGemmDepth);
  for (int64_t top = 0; top < rows; top += kGemmBlock) {
    const int64_t bottom = rows - top < kGemmBlock ? rows : top + kGemmBlock;
    for (int64_t first = begin; first < end; first += kGemmGroup) {
      const int64_t last = end - first < kGemmGroup ? end : first + kGemmGroup;
      for (int64_t k = 0; k < depth; k += piece) {
        const int64_t terms = depth - k < piece ? depth - k : piece;
        for (int64_t i = 0; back && i < terms; ++i) {
          pack_columns(w + (k + i) * w_stride + first, last - first, kPanel, panels + i * kGemmColumns);
        }
        float* panel = panels;
        for (int64_t o = first; o < last; o += kGemmColumns, panel += kPanel) {
          const int64_t columns = last - o < kGemmColumns ? last - o : kGemmColumns;
          if (!back) pack_rows(w + o * w_stride + k, w_stride, columns, terms, panel);
          const int64_t after = end - o - kGemmColumns;
          int64_t m = top;
          auto tiles = [&](auto count) {
            constexpr int R = decltype(count)::value;
            for (; m + R <= bottom; m += R) {
              if (!back && after > 0) {
                fetch(w + (o + kGemmColumns) * w_stride + k, 4 * w_stride, after < kGemmColumns ? after : kGemmColumns,
                      4 * terms, (m - top) / R, (bottom - top) / R);
              }
              float* target = y + m * y_stride + o;
              const float* before = k > 0 ? target : onto ? onto + m * onto_stride + o : nullptr;
              gemm_tile<R>(x + m * x_stride + k, x_stride, panel, terms, before, k > 0 ? y_stride : onto_stride, target,
                           y_stride, columns);
            }
          };
          tiles(Constant<kGemmRows>());
          tiles(Constant<kGemmRows / 3>());
          tiles(Constant<1>());
        }
      }
    }
  }
}

/// Largest |x|.
inline float magnitude(const float* x, int64_t size) {
  Floats tops{};
  float top = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats v = load(x + i);
    v = select(v < 0.0f, -v, v);
    tops = select(v > tops, v, tops);
  }
  for (; i < size; ++i) top = __builtin_fabsf(x[i]) > top ? __builtin_fabsf(x[i]) : top;
  return max(tops) > top ? max(tops) : top;
}

/// q = round(x / scale) with scale = max |x| / limit, which is returned.
template <class Q>
inline float quantize(const float* x, Q* q, int64_t size, float limit) {
  const float top = magnitude(x, size);
  const float scale = top > 0 ? top / limit : 1e-30f;
  const float inverse = 1.0f / scale;
  const float magic = 12582912.0f;  // rounds to the nearest integer; |x| inverse <= limit
  for (int64_t i = 0; i < size; ++i) {
    const float rounded = x[i] * inverse + magic;
    q[i] = static_cast<Q>(rounded - magic);
  }
  return scale;
}

void quantize_int16(const float* x, int16_t* q, int64_t q_stride, float* x_scales, int64_t in, int64_t begin,
                    int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    int16_t* row = q + m * q_stride;
    x_scales[m] = quantize(x + m * in, row, in, 32767.0f);
    for (int64_t i = in; i < q_stride; ++i) row[i] = 0;
  }
}
void quantize_int8(const float* w, int8_t* q, float* scales, int64_t in, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) scales[o] = quantize(w + o * in, q + o * in, in, 127.0f);
}

// Products of int16 activations with int8 weights, exact in int32 for kDepth terms: kDepth 127 32767 < 2^31.
constexpr int64_t kDepth = 512;

constexpr int64_t kPairs = 2 * kLanes;  // int16 of a vector

// load_int16: a vector of them; load_wide: as many int8 as int16; same_pair: two int16 everywhere; add_pairs: acc plus
// the products of pairs.
#if defined(__AVX512F__)
inline __m512i load_int16(const int16_t* p) { return _mm512_loadu_si512(p); }
inline __m512i load_wide(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i same_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Ints add_pairs(Ints acc, __m512i a, __m512i b) {
  return reinterpret_cast<Ints>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc), a, b));
}
#elif defined(__AVX2__)
inline __m256i load_int16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_wide(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i same_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Ints add_pairs(Ints acc, __m256i a, __m256i b) { return acc + reinterpret_cast<Ints>(_mm256_madd_epi16(a, b)); }
#endif

/// The dot product of up to kDepth terms of an int16 row with an int8 row.
inline int32_t dot_int8(const int16_t* x, const int8_t* w, int64_t in) {
  int32_t total = 0;
  int64_t i = 0;
#ifdef __AVX2__
  constexpr int64_t kStepInt8 = kPairs * kChains;
  constexpr int64_t kPrefetch = 2048;  // bytes ahead; +15 % when the weights come from memory
  Ints acc[kChains] = {};
  for (; i + kStepInt8 <= in; i += kStepInt8) {
    for (int64_t line = 0; line < kStepInt8; line += 64) __builtin_prefetch(w + i + kPrefetch + line);
    for (int64_t c = 0; c < kChains; ++c) {
      acc[c] = add_pairs(acc[c], load_wide(w + i + kPairs * c), load_int16(x + i + kPairs * c));
    }
  }
  for (; i + kPairs <= in; i += kPairs) acc[0] = add_pairs(acc[0], load_wide(w + i), load_int16(x + i));
  total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
#endif
  for (; i < in; ++i) total += static_cast<int32_t>(x[i]) * w[i];
  return total;
}

/// M rows of x (`x_stride` apart) times O rows of w (`in` apart), up to kDepth terms: sums [M, O].
template <int M, int O>
inline void dots_int8(const int16_t* x, int64_t x_stride, const int8_t* w, int64_t in, int64_t depth, int32_t* sums) {
  int64_t i = 0;
#ifdef __AVX2__
  constexpr int64_t kPrefetch = 1024;  // bytes ahead
  Ints acc[M][O] = {};
  for (; i + kPairs <= depth; i += kPairs) {
    decltype(load_wide(w)) ws[O];
    for (int o = 0; o < O; ++o) {
      __builtin_prefetch(w + o * in + i + kPrefetch);
      ws[o] = load_wide(w + o * in + i);
    }
    for (int m = 0; m < M; ++m) {
      const auto xs = load_int16(x + m * x_stride + i);
      for (int o = 0; o < O; ++o) acc[m][o] = add_pairs(acc[m][o], ws[o], xs);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int o = 0; o < O; ++o) sums[m * O + o] = sum(acc[m][o]);
  }
#else
  for (int j = 0; j < M * O; ++j) sums[j] = 0;
#endif
  for (; i < depth; ++i) {
    for (int m = 0; m < M; ++m) {
      for (int o = 0; o < O; ++o) sums[m * O + o] += static_cast<int32_t>(x[m * x_stride + i]) * w[o * in + i];
    }
  }
}

/// What an exact piece of a dot product makes of an output. V: float, or a vector of them.
template <class V>
inline V with_piece(V before, V piece, V scale, float x_scale) {
  const V product = piece * scale * x_scale;
  return product + before;
}

/// M rows times O rows of w, whole: y [M, O], rows `out` apart.
template <int M, int O>
inline void tile_rows_int8(const int16_t* x, int64_t x_stride, const float* x_scales, const int8_t* w,
                           const float* scales, const float* bias, float* y, int64_t in, int64_t out) {
  int32_t sums[M * O];
  const int64_t piece = piece_of(in, kDepth);
  for (int64_t k = 0; k < in; k += piece) {
    dots_int8<M, O>(x + k, x_stride, w + k, in, in - k < piece ? in - k : piece, sums);
    for (int m = 0; m < M; ++m) {
      for (int o = 0; o < O; ++o) {
        float& target = y[m * out + o];
        target = with_piece(k > 0  ? target
                            : bias ? bias[o]
                                   : 0.0f,
                            static_cast<float>(sums[m * O + o]), scales[o], x_scales[m]);
      }
    }
  }
}

void gemv_int8(const int16_t* x, int64_t x_stride, const float* x_scales, int64_t rows, const int8_t* w,
               const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin, int64_t end) {
  constexpr int kTile = 4, kColumns = 2;
  const int64_t piece = piece_of(in, kDepth);
  int64_t o = begin;
  for (; rows > 1 && o + kColumns <= end; o += kColumns) {
    auto tile = [&](auto count, int64_t m) {
      tile_rows_int8<decltype(count)::value, kColumns>(x + m * x_stride, x_stride, x_scales + m, w + o * in, scales + o,
                                                       bias ? bias + o : nullptr, y + m * out + o, in, out);
    };
    int64_t m = 0;
    for (; m + kTile <= rows; m += kTile) tile(Constant<kTile>(), m);
    for (; m + 2 <= rows; m += 2) tile(Constant<2>(), m);
    if (m < rows) tile(Constant<1>(), m);
  }
  for (; o < end; ++o) {
    for (int64_t m = 0; m < rows; ++m) {
      float total = bias ? bias[o] : 0.0f;
      for (int64_t k = 0; k < in; k += piece) {
        const int32_t sum = dot_int8(x + m * x_stride + k, w + o * in + k, in - k < piece ? in - k : piece);
        total = with_piece(total, static_cast<float>(sum), scales[o], x_scales[m]);
      }
      y[m * out + o] = total;
    }
  }
}

#ifndef __AVX512F__
constexpr int kPairRows = 6;  // whose sums fill the registers

/// `columns` rows of w as int16, `depth` terms of them, pairs side by side: panel [ceil(depth / 2), kGemmColumns, 2],
/// zero where w ends.
inline void pack_pairs(const int8_t* w, int64_t in, int64_t columns, int64_t depth, int16_t* panel) {
  constexpr int64_t kTerms = 16;  // of a transposition
  for (int64_t c = 0; c < kGemmColumns; c += 8) {
    int64_t k = 0;
    for (; c + 8 <= columns && k + kTerms <= depth; k += kTerms) {
      auto row = [&](int i) {
        return reinterpret_cast<Eight>(__builtin_convertvector(load_as<Bytes>(w + (c + i) * in + k), Shorts));
      };
      transpose_eight(row, reinterpret_cast<float*>(panel + k * kGemmColumns + 2 * c));
    }
    for (; k < (depth + 1) / 2 * 2; ++k) {
      for (int64_t i = c; i < c + 8; ++i) {
        panel[k / 2 * 2 * kGemmColumns + 2 * i + k % 2] = i < columns && k < depth ? w[i * in + k] : 0;
      }
    }
  }
}

/// acc plus, in each lane, a pair of the panel times the pair x.
inline Ints add_pair(Ints acc, const int16_t* pairs, const int16_t* x) {
#ifdef __AVX2__
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  return add_pairs(acc, load_int16(pairs), same_pair(pair));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) acc[lane] += x[0] * pairs[2 * lane] + x[1] * pairs[2 * lane + 1];
  return acc;
#endif
}

/// R rows of x times a panel, onto `before` (rows `before_stride` apart; null: zeros) into y [R, columns].
template <int R>
inline void pairs_tile(const int16_t* x, int64_t x_stride, const float* x_scales, const int16_t* panel, int64_t depth,
                       const float* scales, const float* before, int64_t before_stride, float* y, int64_t y_stride,
                       int64_t columns) {
  Ints acc[R][2] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        acc[r][half] = add_pair(acc[r][half], panel + k * kGemmColumns + 2 * half * kLanes, x + r * x_stride + k);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t column = half * kLanes, left = columns - column, count = left < kLanes ? left : kLanes;
      if (count <= 0) break;
      const Floats onto = before ? load_piece(before + r * before_stride + column, count) : Floats{};
      store_piece(y + r * y_stride + column,
                  with_piece(onto, __builtin_convertvector(acc[r][half], Floats), load_piece(scales + column, count),
                             x_scales[r]),
                  count);
    }
  }
}

void gemm_int8(const int16_t* x, int64_t x_stride, const float* x_scales, int64_t rows, const int8_t* w,
               const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin, int64_t end) {
  alignas(64) int16_t panel[kDepth * kGemmColumns];
  const int64_t piece = piece_of(in, kDepth);
  for (int64_t top = 0; top < rows; top += kGemmBlock) {
    const int64_t bottom = rows - top < kGemmBlock ? rows : top + kGemmBlock;
    for (int64_t o = begin; o < end; o += kGemmColumns) {
      const int64_t after = end - o - kGemmColumns, columns = after < 0 ? end - o : kGemmColumns;
      for (int64_t k = 0; k < in; k += piece) {
        const int64_t terms = in - k < piece ? in - k : piece;
        pack_pairs(w + o * in + k, in, columns, terms, panel);
        int64_t m = top;
        auto tiles = [&](auto count) {
          constexpr int R = decltype(count)::value;
          for (; m + R <= bottom; m += R) {
            if (after > 0) {
              fetch(w + (o + kGemmColumns) * in + k, in, after < kGemmColumns ? after : kGemmColumns, terms,
                    (m - top) / R, (bottom - top) / R);
            }
            float* target = y + m * out + o;
            const float* before = k > 0 ? target : bias ? bias + o : nullptr;
            pairs_tile<R>(x + m * x_stride + k, x_stride, x_scales + m, panel, terms, scales + o, before,
                          k > 0 ? out : 0, target, out, columns);
          }
        };
        tiles(Constant<kPairRows>());
        tiles(Constant<kPairRows / 3>());
        tiles(Constant<1>());
      }
    }
  }
}
#else
// Of so few rows as come here the panels of AVX2 are faster.
void gemm_int8(const int16_t* x, int64_t x_stride, const float* x_scales, int64_t rows, const int8_t* w,
               const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin, int64_t end) {
  kAvx2Kernels.gemm_int8(x, x_stride, x_scales, rows, w, scales, bias, y, in, out, begin, end);
}
#endif

// Products of int8 activations with int8 weights: blocks of kInt8Block terms are exact, then weighed by the
// activations' scales.

void quantize_blocks(const float* x, int8_t* q, float* x_scales, int32_t* offsets, int64_t in, int64_t begin,
                     int64_t end) {
  const int64_t blocks = (in + kInt8Block - 1) / kInt8Block;
  for (int64_t b = begin * blocks; b < end * blocks; ++b) {
    const int64_t k = b % blocks * kInt8Block, count = in - k < kInt8Block ? in - k : kInt8Block;
    int8_t* block = q + b * kInt8Block;
    x_scales[b] = quantize(x + b / blocks * in + k, block, count, 127.0f);
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += block[i];
    for (int64_t i = count; i < kInt8Block; ++i) block[i] = 0;
    offsets[b] = -128 * total;
  }
}

/// acc plus, in each lane, the products of 4 bytes of w, unsigned, with the 4 signed ones of x.
inline Ints add_quads(Ints acc, const uint8_t* w, const int8_t* x) {
#ifdef __AVX512VNNI__
  int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return reinterpret_cast<Ints>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), _mm512_loadu_si512(w), _mm512_set1_epi32(quad)));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) acc[lane] += int32_t{w[4 * lane + i]} * x[i];
  }
  return acc;
#endif
}

constexpr int kBlockRows = 6;                      // whose sums, of integers and of blocks, fill the registers
constexpr int64_t kBlocksDepth = 32 * kInt8Block;  // of a panel that fills the first cache

/// `columns` rows of w, 128 added to each number, `depth` terms of them: panel [ceil(depth / 4), kGemmColumns, 4], zero
/// products behind `depth`.
inline void pack_quads(const int8_t* w, int64_t in, int64_t columns, int64_t depth, uint8_t* panel) {
  constexpr int64_t kQuads = 8;  // of a transposition
  for (int64_t c = 0; c < kGemmColumns; c += 8) {
    int64_t k = 0;
    for (; c + 8 <= columns && k + 4 * kQuads <= depth; k += 4 * kQuads) {
      auto row = [&](int i) {
        return reinterpret_cast<Eight>(load_as<EightWords>(w + (c + i) * in + k) ^ 0x80808080u);
      };
      transpose_eight(row, reinterpret_cast<float*>(panel + k * kGemmColumns + 4 * c));
    }
    for (; k < depth; ++k) {
      for (int64_t i = c; i < c + 8; ++i) {
        const uint8_t number = i < columns ? static_cast<uint8_t>(w[i * in + k]) ^ 0x80 : 0;
        panel[k / 4 * 4 * kGemmColumns + 4 * i + k % 4] = number;
      }
    }
  }
}

/// R rows of `blocks` blocks times a panel, onto `sums` (of y's layout; null: zeros) into y [R, columns]; the last
/// panel's are scaled.
template <int R>
inline void blocks_tile(const int8_t* q, int64_t q_stride, const float* x_scales, const int32_t* offsets,
                        int64_t scales_stride, const uint8_t* panel, int64_t blocks, bool first, const float* scales,
                        const float* bias, float* y, int64_t y_stride, int64_t columns) {
  Floats sums[R][2] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    Ints acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Ints{} + offsets[r * scales_stride + b];
    for (int64_t k = b * kInt8Block; k < (b + 1) * kInt8Block; k += 4) {
      for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) {
          acc[r][half] = add_quads(acc[r][half], panel + k * kGemmColumns + 4 * half * kLanes, q + r * q_stride + k);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        sums[r][half] += __builtin_convertvector(acc[r][half], Floats) * x_scales[r * scales_stride + b];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t column = half * kLanes, left = columns - column, count = left < kLanes ? left : kLanes;
      if (count <= 0) break;
      float* target = y + r * y_stride + column;
      if (!first) sums[r][half] += load_piece(target, count);
      if (scales) sums[r][half] *= load_piece(scales + column, count);
      if (bias) sums[r][half] += load_piece(bias + column, count);
      store_piece(target, sums[r][half], count);
    }
  }
}

void gemm_blocks(const int8_t* q, const float* x_scales, const int32_t* offsets, int64_t rows, const int8_t* w,
                 const float* scales, const float* bias, float* y, int64_t in, int64_t out, int64_t begin,
                 int64_t end) {
  const int64_t all = (in + kInt8Block - 1) / kInt8Block, stride = all * kInt8Block;
  alignas(64) uint8_t panel[kBlocksDepth * kGemmColumns];
  for (int64_t top = 0; top < rows; top += kGemmBlock) {
    const int64_t bottom = rows - top < kGemmBlock ? rows : top + kGemmBlock;
    for (int64_t o = begin; o < end; o += kGemmColumns) {
      const int64_t after = end - o - kGemmColumns, columns = after < 0 ? end - o : kGemmColumns;
      for (int64_t k = 0; k < in; k += kBlocksDepth) {
        const bool last = k + kBlocksDepth >= in;
        const int64_t depth = last ? in - k : kBlocksDepth, block = k / kInt8Block;
        pack_quads(w + o * in + k, in, columns, depth, panel);
        int64_t m = top;
        auto tiles = [&](auto count) {
          constexpr int R = decltype(count)::value;
          for (; m + R <= bottom; m += R) {
            if (after > 0) {
              fetch(w + (o + kGemmColumns) * in + k, in, after < kGemmColumns ? after : kGemmColumns, depth,
                    (m - top) / R, (bottom - top) / R);
            }
            blocks_tile<R>(q + m * stride + k, stride, x_scales + m * all + block, offsets + m * all + block, all,
                           panel, (depth + kInt8Block - 1) / kInt8Block, k == 0, last ? scales + o : nullptr,
                           last && bias ? bias + o : nullptr, y + m * out + o, out, columns);
          }
        };
        tiles(Constant<kBlockRows>());
        tiles(Constant<kBlockRows / 3>());
        tiles(Constant<1>());
      }
    }
  }
}

// Thin products: one side of a low-rank pair -------------------------------------------------------------------------

template <int M, int R>
inline void thin_dot_block(const float* x, int64_t x_stride, const float* a, int64_t d, float scale, float* u,
                           int64_t u_stride) {
  Floats acc[M][R] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Floats xs[M];
    for (int m = 0; m < M; ++m) xs[m] = load(x + m * x_stride + i);
    for (int r = 0; r < R; ++r) {
      const Floats as = load(a + r * d + i);
      for (int m = 0; m < M; ++m) acc[m][r] += xs[m] * as;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      float total = sum(acc[m][r]);
      for (int64_t j = i; j < d; ++j) total += x[m * x_stride + j] * a[r * d + j];
      u[m * u_stride + r] = scale * total;
    }
  }
}

template <int M>
inline void thin_dot_rows(const float* x, int64_t x_stride, const float* a, int64_t rank, int64_t d, float scale,
                          float* u, int64_t u_stride) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) thin_dot_block<M, 4>(x, x_stride, a + r * d, d, scale, u + r, u_stride);
  for (; r < rank; ++r) thin_dot_block<M, 1>(x, x_stride, a + r * d, d, scale, u + r, u_stride);
}

void thin_dots(const float* x, int64_t x_stride, const float* a, int64_t rank, int64_t d, float scale, float* u,
               int64_t u_stride, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 3 <= end; n += 3) {
    thin_dot_rows<3>(x + n * x_stride, x_stride, a, rank, d, scale, u + n * u_stride, u_stride);
  }
  for (; n < end; ++n) thin_dot_rows<1>(x + n * x_stride, x_stride, a, rank, d, scale, u + n * u_stride, u_stride);
}

/// y[m] += scale g[m] . a for M rows and R of a's rows.
template <int M, int R>
inline void thin_add_block(const float* g, int64_t g_stride, const float* a, int64_t d, float scale, float* y,
                           int64_t y_stride) {
  float gs[M][R];
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) gs[m][r] = scale * g[m * g_stride + r];
  }
  for_pieces(d, [&](int64_t i, int64_t count) {
    Floats acc[M];
    for (int m = 0; m < M; ++m) acc[m] = load_piece(y + m * y_stride + i, count);
    for (int r = 0; r < R; ++r) {
      const Floats as = load_piece(a + r * d + i, count);
      for (int m = 0; m < M; ++m) acc[m] += gs[m][r] * as;
    }
    for (int m = 0; m < M; ++m) store_piece(y + m * y_stride + i, acc[m], count);
  });
}

template <int M>
inline void thin_add_rows(const float* g, int64_t g_stride, const float* a, int64_t rank, int64_t d, float scale,
                          float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) thin_add_block<M, 4>(g + r, g_stride, a + r * d, d, scale, y, y_stride);
  for (; r < rank; ++r) thin_add_block<M, 1>(g + r, g_stride, a + r * d, d, scale, y, y_stride);
}

void thin_add(const float* g, int64_t g_stride, const float* a, int64_t rank, int64_t d, float scale, float* y,
              int64_t y_stride, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 2 <= end; n += 2) {
    thin_add_rows<2>(g + n * g_stride, g_stride, a, rank, d, scale, y + n * y_stride, y_stride);
  }
  if (n < end) thin_add_rows<1>(g + n * g_stride, g_stride, a, rank, d, scale, y + n * y_stride, y_stride);
}

/// sums [R, d] += scale g^T x over `rows` rows.
template <int R>
inline void thin_outer_block(const float* g, int64_t g_stride, const float* x, int64_t x_stride, int64_t rows,
                             int64_t d, float scale, float* sums) {
  for_pieces(d, [&](int64_t i, int64_t count) {
    Floats acc[R];
    for (int r = 0; r < R; ++r) acc[r] = load_piece(sums + r * d + i, count);
    for (int64_t n = 0; n < rows; ++n) {
      const Floats xs = scale * load_piece(x + n * x_stride + i, count);
      for (int r = 0; r < R; ++r) acc[r] += g[n * g_stride + r] * xs;
    }
    for (int r = 0; r < R; ++r) store_piece(sums + r * d + i, acc[r], count);
  });
}

void thin_outer(const float* g, int64_t g_stride, const float* x, int64_t x_stride, int64_t rank, int64_t d,
                float scale, float* sums, int64_t begin, int64_t end) {
  const float *g_rows = g + begin * g_stride, *x_rows = x + begin * x_stride;
  int64_t r = 0;
  for (; r + 4 <= rank; r += 4) {
    thin_outer_block<4>(g_rows + r, g_stride, x_rows, x_stride, end - begin, d, scale, sums + r * d);
  }
  for (; r < rank; ++r) {
    thin_outer_block<1>(g_rows + r, g_stride, x_rows, x_stride, end - begin, d, scale, sums + r * d);
  }
}

// RMSNorm ------------------------------------------------------------------------------------------------------------

void rms_norm(const float* x, const float* weight, float offset, float eps, float* y, float* rstd, int64_t d,
              int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* row = x + n * d;
    Floats squares{};
    for_pieces(d, [&](int64_t i, int64_t count) {
      Floats v = load_piece(row + i, count);
      squares += v * v;
    });
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + eps);
    rstd[n] = scale;
    for_pieces(d, [&](int64_t i, int64_t count) {
      store_piece(y + n * d + i, load_piece(row + i, count) * scale * (load_piece(weight + i, count) + offset), count);
    });
  }
}

void rms_norm_backward(const float* dy, const float* x, const float* weight, float offset, const float* rstd, float* dx,
                       int64_t d, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    Floats dots{};
    for_pieces(d, [&](int64_t i, int64_t count) {
      dots += load_piece(dy + n * d + i, count) * (load_piece(weight + i, count) + offset) *
              load_piece(x + n * d + i, count);
    });
    const float scale = rstd[n];
    const float mean = sum(dots) * scale * scale / static_cast<float>(d);  // mean(g xhat) rstd
    for_pieces(d, [&](int64_t i, int64_t count) {
      Floats g = load_piece(dy + n * d + i, count) * (load_piece(weight + i, count) + offset);
      store_piece(dx + n * d + i, (g - load_piece(x + n * d + i, count) * mean) * scale, count);
    });
  }
}

// Gated linear unit --------------------------------------------------------------------------------------------------

constexpr float kSqrt2OverPi = 0.7978845608f;
constexpr float kGeluCubic = 0.044715f;

struct Silu {
  static Floats value(Floats g) { return g * sigmoid(g); }
  static void both(Floats g, Floats& value, Floats& slope) {
    Floats s = sigmoid(g);
    value = g * s;
    slope = s + value * (1.0f - s);
  }
};
struct GeluTanh {
  static Floats value(Floats g) { return 0.5f * g * (1.0f + tanh(kSqrt2OverPi * (g + kGeluCubic * g * g * g))); }
  static void both(Floats g, Floats& value, Floats& slope) {
    Floats t = tanh(kSqrt2OverPi * (g + kGeluCubic * g * g * g));
    value = 0.5f * g * (1.0f + t);
    slope = 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * kSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * g * g);
  }
};

template <class Act>
void glu_rows(const float* gate_up, float* y, int64_t f, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* gate = gate_up + n * 2 * f;
    for_pieces(f, [&](int64_t i, int64_t count) {
      store_piece(y + n * f + i, Act::value(load_piece(gate + i, count)) * load_piece(gate + f + i, count), count);
    });
  }
}
void glu(const float* gate_up, float* y, int64_t f, GluKind kind, int64_t begin, int64_t end) {
  if (kind == GluKind::kSilu) {
    glu_rows<Silu>(gate_up, y, f, begin, end);
  } else {
    glu_rows<GeluTanh>(gate_up, y, f, begin, end);
  }
}

template <class Act>
void glu_backward_rows(const float* dy, const float* gate_up, float* d_gate_up, int64_t f, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* gate = gate_up + n * 2 * f;
    float* d_gate = d_gate_up + n * 2 * f;
    for_pieces(f, [&](int64_t i, int64_t count) {
      Floats grad = load_piece(dy + n * f + i, count), value, slope;
      Act::both(load_piece(gate + i, count), value, slope);
      store_piece(d_gate + i, grad * load_piece(gate + f + i, count) * slope, count);
      store_piece(d_gate + f + i, grad * value, count);
    });
  }
}
void glu_backward(const float* dy, const float* gate_up, float* d_gate_up, int64_t f, GluKind kind, int64_t begin,
                  int64_t end) {
  if (kind == GluKind::kSilu) {
    glu_backward_rows<Silu>(dy, gate_up, d_gate_up, f, begin, end);
  } else {
    glu_backward_rows<GeluTanh>(dy, gate_up, d_gate_up, f, begin, end);
  }
}

// Rotary positions ---------------------------------------------------------------------------------------------------

void rope(const float* x, int64_t x_stride, float* y, int64_t y_stride, const float* cos, const float* sin, float sign,
          int64_t heads, int64_t k, int64_t begin, int64_t end) {
  const int64_t half = k / 2;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* source = x + n * x_stride + h * k;
      float* target = y + n * y_stride + h * k;
      for_pieces(half, [&](int64_t i, int64_t count) {
        Floats c = load_piece(cos + n * half + i, count), s = load_piece(sin + n * half + i, count) * sign;
        Floats first = load_piece(source + i, count), second = load_piece(source + half + i, count);
        store_piece(target + i, first * c - second * s, count);
        store_piece(target + half + i, second * c + first * s, count);
      });
    }
  }
}

// Attention of one position ------------------------------------------------------------------------------------------

void attend(const float* q, const float* keys, const float* values, int64_t stride, int64_t length, int64_t group,
            int64_t k, float scale, float softcap, const float* bias, int64_t bias_stride, float* scores, float* out) {
  constexpr int64_t kAhead = 8;  // rows to prefetch ahead: they are too far apart for the processor to foresee
  auto prefetch = [&](const float* row) {
    for (int64_t i = 0; i < k; i += kLine) __builtin_prefetch(row + kAhead * stride + i);
  };
  for (int64_t j = 0; j < length; ++j) {
    const float* key = keys + j * stride;
    prefetch(key);
    for (int64_t h = 0; h < group; ++h) {
      Floats dots{};
      for_pieces(
          k, [&](int64_t i, int64_t count) { dots += load_piece(q + h * k + i, count) * load_piece(key + i, count); });
      scores[h * length + j] = sum(dots) * scale;
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    float* row = scores + h * length;
    if (softcap > 0) {
      for_pieces(length, [&](int64_t i, int64_t count) {
        store_piece(row + i, softcap * tanh(load_piece(row + i, count) / softcap), count);
      });
    }
    if (bias != nullptr) {
      const float* added = bias + h * bias_stride;
      for_pieces(length, [&](int64_t i, int64_t count) {
        store_piece(row + i, load_piece(row + i, count) + load_piece(added + i, count), count);
      });
    }
    Floats tops = splat(row[0]);
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) {
      Floats v = load(row + j);
      tops = select(v > tops, v, tops);
    }
    float top = max(tops);
    for (; j < length; ++j) top = row[j] > top ? row[j] : top;
    float total = 0;
    for_pieces(length, [&](int64_t i, int64_t count) {
      Floats p = exp(load_piece(row + i, count) - top);
      store_piece(row + i, p, count);
      for (int64_t l = 0; l < count; ++l) total += p[l];
    });
    const float norm = 1.0f / total;
    for_pieces(length,
               [&](int64_t i, int64_t count) { store_piece(row + i, load_piece(row + i, count) * norm, count); });
  }
  for_pieces(group * k, [&](int64_t i, int64_t count) { store_piece(out + i, Floats{}, count); });
  for (int64_t j = 0; j < length; ++j) {
    const float* value = values + j * stride;
    prefetch(value);
    for (int64_t h = 0; h < group; ++h) {
      const float p = scores[h * length + j];
      float* target = out + h * k;
      for_pieces(k, [&](int64_t i, int64_t count) {
        store_piece(target + i, load_piece(target + i, count) + load_piece(value + i, count) * p, count);
      });
    }
  }
}

// Attention of many positions ----------------------------------------------------------------------------------------

constexpr int64_t kAttendRows = 72, kAttendKeys = 256;  // of a block of scores

struct Range {
  int64_t first, last;
};
/// The keys that row n sees.
inline Range seen_by(const SeenKeys& seen, int64_t n) {
  const int64_t position = seen.position + n;
  int64_t first = 0, last = seen.causal ? position + 1 : seen.count;
  if (seen.window > 0) {
    first = position - seen.window + (seen.causal ? 1 : 0);
    if (!seen.causal) last = position + seen.behind + 1;
  }
  return {first < 0 ? 0 : first, last > seen.count ? seen.count : last};
}
/// Of `range` what lies in the block of keys at `key`, counted from there.
inline Range in_block(Range range, int64_t key, int64_t count) {
  const int64_t first = range.first - key, last = range.last - key;
  return {first < 0 ? 0 : first, last > count ? count : last};
}

/// Scores s [count] of row n with the keys from `key` on, within `range`: scaled, capped and biased.
inline void finish_scores(const SeenKeys& seen, int64_t n, int64_t key, Range range, float* s) {
  const float* bias = seen.bias ? seen.bias + n * seen.bias_stride + key + range.first : nullptr;
  s += range.first;
  for_pieces(range.last - range.first, [&](int64_t i, int64_t count) {
    Floats v = load_piece(s + i, count) * seen.scale;
    if (seen.softcap > 0) v = seen.softcap * tanh(v / seen.softcap);
    if (bias) v += load_piece(bias + i, count);
    store_piece(s + i, v, count);
  });
}

/// Of a row's scores s [count], within `range`: e^(s - top), zeros elsewhere. top, total: the largest score and the sum
/// so far; returns what the earlier sums are to be multiplied with.
inline float soften(float* s, int64_t count, Range range, float& top, float& total) {
  for (int64_t i = 0; i < range.first && i < count; ++i) s[i] = 0;
  for (int64_t i = range.last < 0 ? 0 : range.last; i < count; ++i) s[i] = 0;
  float best = -__builtin_inff();
  int64_t i = range.first;
  if (i + kLanes <= range.last) {
    Floats tops = load(s + i);
    for (i += kLanes; i + kLanes <= range.last; i += kLanes) {
      const Floats v = load(s + i);
      tops = select(v > tops, v, tops);
    }
    best = max(tops);
  }
  for (; i < range.last; ++i) best = s[i] > best ? s[i] : best;
  if (best == -__builtin_inff()) {  // nothing is seen
    for (i = range.first; i < range.last; ++i) s[i] = 0;
    return 1;
  }
  const float factor = best > top ? exp(splat(top - best))[0] : 1.0f;
  top = best > top ? best : top;
  Floats sums{};
  float rest = 0;
  for_pieces(range.last - range.first, [&](int64_t j, int64_t pieces) {
    const Floats p = exp(load_piece(s + range.first + j, pieces) - top);
    store_piece(s + range.first + j, p, pieces);
    if (pieces == kLanes) {
      sums += p;
    } else {
      for (int64_t l = 0; l < pieces; ++l) rest += p[l];
    }
  });
  total = total * factor + (sum(sums) + rest);
  return factor;
}

inline void scale_row(float* row, int64_t size, float factor) {
  for_pieces(size, [&](int64_t i, int64_t count) { store_piece(row + i, load_piece(row + i, count) * factor, count); });
}

/// Calls body(row, rows, key, keys, begun, ends) for the blocks of scores in which some row sees something, keys
/// ascending within a block of rows.
template <class Body>
inline void for_score_blocks(const SeenKeys& seen, int64_t rows, Body body) {
  for (int64_t row = 0; row < rows; row += kAttendRows) {
    const int64_t some = rows - row < kAttendRows ? rows - row : kAttendRows;
    const int64_t begin = seen_by(seen, row).first / kAttendKeys * kAttendKeys,
                  end = seen_by(seen, row + some - 1).last;
    for (int64_t key = begin; key < end; key += kAttendKeys) {
      body(row, some, key, end - key < kAttendKeys ? end - key : kAttendKeys, key > begin, key + kAttendKeys >= end);
    }
  }
}

void attend_rows(const float* q, int64_t q_stride, int64_t rows, const SeenKeys& seen, float* out, int64_t out_stride,
                 float* log_sums, int64_t log_sums_stride) {
  alignas(64) float scores[kAttendRows * kAttendKeys];
  float tops[kAttendRows], totals[kAttendRows];
  for_score_blocks(seen, rows, [&](int64_t row, int64_t some, int64_t key, int64_t keys, bool begun, bool ends) {
    gemm_f32(q + row * q_stride, q_stride, some, seen.keys + key * seen.stride, seen.stride, /*back=*/false, nullptr, 0,
             scores, kAttendKeys, seen.k, 0, keys);
    float* target = out + row * out_stride;
    for (int64_t n = 0; n < some; ++n) {
      if (!begun) {
        tops[n] = -__builtin_inff();
        totals[n] = 0;
      }
      const Range range = in_block(seen_by(seen, row + n), key, keys);
      finish_scores(seen, row + n, key, range, scores + n * kAttendKeys);
      const float factor = soften(scores + n * kAttendKeys, keys, range, tops[n], totals[n]);
      if (begun && factor != 1) scale_row(target + n * out_stride, seen.k, factor);
    }
    gemm_f32(scores, kAttendKeys, some, seen.values + key * seen.stride, seen.stride, /*back=*/true,
             begun ? target : nullptr, out_stride, target, out_stride, keys, 0, seen.k);
    for (int64_t n = 0; ends && n < some; ++n) {
      scale_row(target + n * out_stride, seen.k, 1.0f / totals[n]);
      if (log_sums) log_sums[(row + n) * log_sums_stride] = tops[n] + __builtin_logf(totals[n]);
    }
  });
}

/// to[j, i] = from[i, j]: [rows, columns], rows kAttendKeys apart, to [columns, rows], rows kAttendRows apart.
inline void transpose_scores(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += 8) {
    int64_t j = 0;
    for (; i + 8 <= rows && j + 8 <= columns; j += 8) {
      transpose_eight([&](int r) { return load_as<Eight>(from + (i + r) * kAttendKeys + j); }, to + j * kAttendRows + i,
                      kAttendRows);
    }
    for (; j < columns; ++j) {
      for (int64_t r = i; r < i + 8 && r < rows; ++r) to[j * kAttendRows + r] = from[r * kAttendKeys + j];
    }
  }
}

void attend_backward(const float* q, int64_t q_stride, const float* out, const float* d_out, int64_t out_stride,
                     const float* log_sums, int64_t log_sums_stride, int64_t rows, const SeenKeys& seen, float* dq,
                     int64_t dq_stride, float* dk, float* dv) {
  alignas(64) float weights[kAttendRows * kAttendKeys], slopes[kAttendRows * kAttendKeys];
  alignas(64) float turned[kAttendKeys * kAttendRows];
  const int64_t k = seen.k, stride = seen.stride;
  for_score_blocks(seen, rows, [&](int64_t row, int64_t some, int64_t key, int64_t keys, bool begun, bool) {
    const float *q_rows = q + row * q_stride, *d_rows = d_out + row * out_stride, *out_rows = out + row * out_stride;
    gemm_f32(q_rows, q_stride, some, seen.keys + key * stride, stride, /*back=*/false, nullptr, 0, weights, kAttendKeys,
             k, 0, keys);
    gemm_f32(d_rows, out_stride, some, seen.values + key * stride, stride, /*back=*/false, nullptr, 0, slopes,
             kAttendKeys, k, 0, keys);
    for (int64_t n = 0; n < some; ++n) {
      Floats dots{};
      for_pieces(k, [&](int64_t i, int64_t count) {
        dots += load_piece(d_rows + n * out_stride + i, count) * load_piece(out_rows + n * out_stride + i, count);
      });
      const float delta = sum(dots), log_sum = log_sums[(row + n) * log_sums_stride];
      float *w = weights + n * kAttendKeys, *d = slopes + n * kAttendKeys;
      const Range range = in_block(seen_by(seen, row + n), key, keys);
      for (int64_t i = 0; i < keys; ++i) {
        if (i >= range.first && i < range.last) continue;
        w[i] = 0;
        d[i] = 0;
      }
      const float* bias = seen.bias ? seen.bias + (row + n) * seen.bias_stride + key : nullptr;
      for_pieces(range.last - range.first, [&](int64_t j, int64_t count) {
        const int64_t i = range.first + j;
        Floats score = load_piece(w + i, count) * seen.scale, slope = splat(seen.scale);
        if (seen.softcap > 0) {
          const Floats capped = tanh(score / seen.softcap);
          score = seen.softcap * capped;
          slope *= 1.0f - capped * capped;
        }
        if (bias) score += load_piece(bias + i, count);
        const Floats p = exp(score - log_sum);
        store_piece(w + i, p, count);
        store_piece(d + i, p * (load_piece(d + i, count) - delta) * slope, count);
      });
    }
    transpose_scores(weights, some, keys, turned);
    gemm_f32(turned, kAttendRows, keys, d_rows, out_stride, /*back=*/true, dv + key * stride, stride, dv + key * stride,
             stride, some, 0, k);
    transpose_scores(slopes, some, keys, turned);
    gemm_f32(turned, kAttendRows, keys, q_rows, q_stride, /*back=*/true, dk + key * stride, stride, dk + key * stride,
             stride, some, 0, k);
    float* target = dq + row * dq_stride;
    gemm_f32(slopes, kAttendKeys, some, seen.keys + key * stride, stride, /*back=*/true, begun ? target : nullptr,
             dq_stride, target, dq_stride, keys, 0, k);
  });
}

}  // namespace

extern const KernelTable MOESAIC_KERNELS = {
    gemv_f32,    gemv_bf16,     gemm_f32,  quantize_int16, gemv_int8,   gemm_int8,       quantize_blocks,
    gemm_blocks, quantize_int8, thin_dots, thin_add,       thin_outer,  rms_norm,        rms_norm_backward,
    glu,         glu_backward,  rope,      attend,         attend_rows, attend_backward,
};

}  // namespace moesaic::nn
