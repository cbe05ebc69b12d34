#include "moesaic/base/visible.h"

#include <fmt/format.h>

namespace moesaic {
namespace {

bool is_continuation(unsigned char byte) { return (byte & 0xC0) == 0x80; }

struct Character {
  unsigned code;
  size_t bytes;
  bool whole;  // else a byte that is no UTF-8
};

Character first_character(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const size_t bytes = lead < 0x80 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 0;
  if (bytes == 0 || bytes > text.size()) return {lead, 1, false};
  unsigned code = bytes == 1 ? lead : lead & (0x7F >> bytes);
  for (size_t i = 1; i < bytes; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (!is_continuation(byte)) return {lead, 1, false};
    code = code << 6 | (byte & 0x3F);
  }
  return {code, bytes, true};
}

bool is_control(unsigned code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || (code >= 0x202A && code <= 0x202E) ||
         (code >= 0x2066 && code <= 0x2069);
}

std::string escaped(std::string_view text, std::string_view kept) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const auto [code, bytes, whole] = first_character(text);
    if (!is_control(code) || (code < 0x20 && kept.find(text[0]) != std::string_view::npos)) {
      out += text.substr(0, bytes);
    } else if (whole) {
      out += fmt::format("\\u{:04x}", code);
    } else {
      out += fmt::format("\\x{:02x}", code);
    }
    text.remove_prefix(bytes);
  }
  return out;
}

}  // namespace

std::string visible(std::string_view text) { return escaped(text, "\t\n"); }

std::string visible_in_line(std::string_view text) { return escaped(text, ""); }

}  // namespace moesaic
