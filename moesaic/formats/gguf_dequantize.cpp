// Dequantisation of ggml's block formats (source: ggml's format definitions; checked against the gguf Python package).
// d and m are float16 scales, q the integers of a block.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

#include "moesaic/formats/gguf.h"

namespace moesaic::formats {
namespace {

float half_at(const uint8_t* data) {
  uint16_t bits;
  std::memcpy(&bits, data, 2);
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

uint32_t u32_at(const uint8_t* data) {
  uint32_t bits;
  std::memcpy(&bits, data, 4);
  return bits;
}

void f32_block(const uint8_t* block, float* y) { std::memcpy(y, block, 4); }
void f16_block(const uint8_t* block, float* y) { *y = half_at(block); }
void bf16_block(const uint8_t* block, float* y) {
  uint16_t bits;
  std::memcpy(&bits, block, 2);
  *y = c10::detail::f32_from_bits(bits);
}

/// d, q[16]: y = d (q - 8); low nibbles are the first half of the block.
void q4_0_block(const uint8_t* block, float* y) {
  const float d = half_at(block);
  const uint8_t* q = block + 2;
  for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>((q[i] & 15) - 8);
  for (int i = 0; i < 16; ++i) y[i + 16] = d * static_cast<float>((q[i] >> 4) - 8);
}

/// d, m, q[16]: y = d q + m.
void q4_1_block(const uint8_t* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const uint8_t* q = block + 4;
  for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>(q[i] & 15) + m;
  for (int i = 0; i < 16; ++i) y[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
}

/// d, fifth bits (32), q[16]: y = d (q - 16).
void q5_0_block(const uint8_t* block, float* y) {
  const float d = half_at(block);
  const uint32_t high = u32_at(block + 2);
  const uint8_t* q = block + 6;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(static_cast<int>((q[i] & 15) | (high >> i & 1) << 4) - 16);
    y[i + 16] = d * static_cast<float>(static_cast<int>((q[i] >> 4) | (high >> (i + 16) & 1) << 4) - 16);
  }
}

/// d, m, fifth bits (32), q[16]: y = d q + m.
void q5_1_block(const uint8_t* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const uint32_t high = u32_at(block + 4);
  const uint8_t* q = block + 8;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((q[i] & 15) | (high >> i & 1) << 4) + m;
    y[i + 16] = d * static_cast<float>((q[i] >> 4) | (high >> (i + 16) & 1) << 4) + m;
  }
}

/// d, q[32] signed: y = d q.
void q8_0_block(const uint8_t* block, float* y) {
  const float d = half_at(block);
  const auto* q = reinterpret_cast<const int8_t*>(block + 2);
  for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(q[i]);
}

/// scales[16] (scale | min << 4), q[64] of 2 bits, d, m: per 16 elements y = d scale q - m min.
void q2_k_block(const uint8_t* block, float* y) {
  const uint8_t *scales = block, *q = block + 16;
  const float d = half_at(block + 80), m = half_at(block + 82);
  for (int group = 0; group < 16; ++group) {
    const float scale = d * static_cast<float>(scales[group] & 15), min = m * static_cast<float>(scales[group] >> 4);
    const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
    const int shift = group % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) y[group * 16 + i] = scale * static_cast<float>(from[i] >> shift & 3) - min;
  }
}

/// high bits[32], q[64] of 2 bits, scales[12] (16 of 6 bits), d: per 16 elements y = d (scale - 32) (q - 4 unless
/// high).
void q3_k_block(const uint8_t* block, float* y) {
  const uint8_t *high = block, *q = block + 32, *scales = block + 96;
  const float d = half_at(block + 108);
  for (int group = 0; group < 16; ++group) {
    const int low4 = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
    const int high2 = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low4 | high2 << 4) - 32);
    const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
    const uint8_t* from_high = high + group % 2 * 16;
    const int shift = group % 8 / 2 * 2, bit = group / 2;
    for (int i = 0; i < 16; ++i) {
      y[group * 16 + i] = scale * static_cast<float>((from[i] >> shift & 3) - ((from_high[i] >> bit & 1) != 0 ? 0 : 4));
    }
  }
}

/// Scale and min `group` (0 to 7) of the 12 bytes that pack 8 + 8 six-bit numbers in Q4_K and Q5_K.
void k_scale_min(const uint8_t* packed, int group, float& scale, float& min) {
  if (group < 4) {
    scale = static_cast<float>(packed[group] & 63);
    min = static_cast<float>(packed[group + 4] & 63);
  } else {
    scale = static_cast<float>((packed[group + 4] & 15) | packed[group - 4] >> 6 << 4);
    min = static_cast<float>(packed[group + 4] >> 4 | packed[group] >> 6 << 4);
  }
}

/// d, m, scales[12], q[128]: per 32 elements y = d scale q - m min; a byte's nibbles belong to neighbouring groups.
void q4_k_block(const uint8_t* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  for (int group = 0; group < 8; ++group) {
    float scale, min;
    k_scale_min(block + 4, group, scale, min);
    scale *= d, min *= m;
    const uint8_t* q = block + 16 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) y[group * 32 + i] = scale * static_cast<float>(q[i] >> shift & 15) - min;
  }
}

/// d, m, scales[12], fifth bits[32], q[128]: as Q4_K.
void q5_k_block(const uint8_t* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const uint8_t* high = block + 16;
  for (int group = 0; group < 8; ++group) {
    float scale, min;
    k_scale_min(block + 4, group, scale, min);
    scale *= d, min *= m;
    const uint8_t* q = block + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      y[group * 32 + i] = scale * static_cast<float>((q[i] >> shift & 15) | (high[i] >> group & 1) << 4) - min;
    }
  }
}

/// low nibbles[128], high bits[64], scales[16] signed, d: per 16 elements y = d scale (q - 32).
void q6_k_block(const uint8_t* block, float* y) {
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float d = half_at(block + 208);
  for (int quarter = 0; quarter < 8; ++quarter) {  // 32 elements each
    const uint8_t* low = block + quarter / 4 * 64 + quarter % 2 * 32;
    const uint8_t* high = block + 128 + quarter / 4 * 32;
    const int low_shift = quarter % 4 / 2 * 4, high_shift = quarter % 4 * 2;
    for (int i = 0; i < 32; ++i) {
      const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
      y[quarter * 32 + i] = d * static_cast<float>(scales[quarter * 2 + i / 16]) * static_cast<float>(q - 32);
    }
  }
}

/// What the four bits of IQ4_NL and IQ4_XS mean.
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/// q[16]: y = d values[q]; low nibbles are the first half.
void iq4_values(const uint8_t* q, float d, float* y) {
  for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>(kIq4Values[q[i] & 15]);
  for (int i = 0; i < 16; ++i) y[i + 16] = d * static_cast<float>(kIq4Values[q[i] >> 4]);
}

void iq4_nl_block(const uint8_t* block, float* y) { iq4_values(block + 2, half_at(block), y); }

/// d, high bits of the scales (16), their low nibbles[4], q[128]: per 32 elements y = d (scale - 32) values[q].
void iq4_xs_block(const uint8_t* block, float* y) {
  const float d = half_at(block);
  const int high = block[2] | block[3] << 8;
  for (int group = 0; group < 8; ++group) {
    const int scale = (block[4 + group / 2] >> (group % 2 * 4) & 15) | (high >> (group * 2) & 3) << 4;
    iq4_values(block + 8 + group * 16, d * static_cast<float>(scale - 32), y + group * 32);
  }
}

template <int64_t elements, int64_t bytes, void (*block)(const uint8_t*, float*)>
void each_block(const uint8_t* blocks, int64_t count, float* out) {
  for (int64_t i = 0; i < count / elements; ++i) block(blocks + i * bytes, out + i * elements);
}

}  // namespace

void dequantize(GgmlType type, const uint8_t* blocks, int64_t count, float* out) {
  switch (type) {
    case GgmlType::kF32: return each_block<1, 4, f32_block>(blocks, count, out);
    case GgmlType::kF16: return each_block<1, 2, f16_block>(blocks, count, out);
    case GgmlType::kBF16: return each_block<1, 2, bf16_block>(blocks, count, out);
    case GgmlType::kQ4_0: return each_block<32, 18, q4_0_block>(blocks, count, out);
    case GgmlType::kQ4_1: return each_block<32, 20, q4_1_block>(blocks, count, out);
    case GgmlType::kQ5_0: return each_block<32, 22, q5_0_block>(blocks, count, out);
    case GgmlType::kQ5_1: return each_block<32, 24, q5_1_block>(blocks, count, out);
    case GgmlType::kQ8_0: return each_block<32, 34, q8_0_block>(blocks, count, out);
    case GgmlType::kQ2_K: return each_block<256, 84, q2_k_block>(blocks, count, out);
    case GgmlType::kQ3_K: return each_block<256, 110, q3_k_block>(blocks, count, out);
    case GgmlType::kQ4_K: return each_block<256, 144, q4_k_block>(blocks, count, out);
    case GgmlType::kQ5_K: return each_block<256, 176, q5_k_block>(blocks, count, out);
    case GgmlType::kQ6_K: return each_block<256, 210, q6_k_block>(blocks, count, out);
    case GgmlType::kIQ4_NL: return each_block<32, 18, iq4_nl_block>(blocks, count, out);
    case GgmlType::kIQ4_XS: return each_block<256, 136, iq4_xs_block>(blocks, count, out);
  }
}

}  // namespace moesaic::formats
