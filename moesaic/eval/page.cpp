#include "moesaic/eval/page.h"

namespace moesaic::eval {
namespace {

constexpr const char* kScript = R"html(</script>
<script>
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const el = id => document.getElementById(id);
const make = (tag, props, ...kids) => { const e = Object.assign(document.createElement(tag), props || {}); e.append(...kids); return e; };
const svg = (tag, attrs, ...kids) => { const e = document.createElementNS('http://www.w3.org/2000/svg', tag); for (const k in attrs) e.setAttribute(k, attrs[k]); e.append(...kids); return e; };

// Light to dark blue, through points chosen to differ evenly in lightness.
const blues = [[247, 249, 253], [205, 221, 245], [143, 180, 232], [79, 131, 208], [36, 87, 173], [14, 45, 106]];
/// The colour at 0 <= x <= 1 of a ramp of colours.
function between(ramp, x) {
  const p = Math.max(0, Math.min(1, x)) * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(p)), f = p - i;
  return ramp[i].map((a, c) => Math.round(a + (ramp[i + 1][c] - a) * f));
}
const css = c => `rgb(${c[0]},${c[1]},${c[2]})`;
const inkOn = c => 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 140 ? '#fff' : '#1d2433';
)html";

}  // namespace

std::string page_with(const char* head, const OrderedJson& data, const char* tail) {
  std::string json = data.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  // "</" would end the script element; JSON allows the escaped slash.
  for (size_t at = 0; (at = json.find("</", at)) != std::string::npos; at += 3) json.insert(at + 1, "\\");
  // "<!--" would open a comment in it.
  for (size_t at = 0; (at = json.find("<!--", at)) != std::string::npos; at += 9) json.replace(at, 1, "\\u003c");
  return head + json + kScript + tail;
}

}  // namespace moesaic::eval
