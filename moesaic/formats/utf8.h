// Whether bytes are text.
#pragma once
#include <cstdint>
#include <string_view>

namespace moesaic::formats {

/// False for what is no UTF-8: cut or overlong characters, surrogates.
inline bool is_utf8(std::string_view text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    if (*p < 0x80) {
      ++p;
      continue;
    }
    const int extra = *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : *p >= 0xc2 ? 1 : -1;
    if (extra < 0 || *p > 0xf4 || end - p <= extra) return false;
    uint32_t point = *p & (0x3f >> extra);
    for (int i = 1; i <= extra; ++i) {
      if ((p[i] & 0xc0) != 0x80) return false;
      point = point << 6 | (p[i] & 0x3f);
    }
    const bool overlong = (extra == 2 && point < 0x800) || (extra == 3 && point < 0x10000);
    if (overlong || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return false;
    p += extra + 1;
  }
  return true;
}

}  // namespace moesaic::formats
