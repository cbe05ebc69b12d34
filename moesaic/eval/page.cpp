#include "moesaic/eval/page.h"

#include "moesaic/base/check.h"
#include "moesaic/eval/pages.h"

namespace moesaic::eval {
namespace {

/// JSON that cannot end the script element it stands in ("</"), nor open a comment in it ("<!--").
std::string script_safe(const OrderedJson& data) {
  std::string json = data.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  for (size_t at = 0; (at = json.find("</", at)) != std::string::npos; at += 3) json.insert(at + 1, "\\");
  for (size_t at = 0; (at = json.find("<!--", at)) != std::string::npos; at += 9) json.replace(at, 1, "\\u003c");
  return json;
}

/// `html` up to `mark` and behind `end`, which follows it.
std::pair<std::string_view, std::string_view> around(std::string_view html, std::string_view mark,
                                                     std::string_view end) {
  const size_t from = html.find(mark), to = html.find(end, from);
  MOESAIC_CHECK(from != std::string_view::npos && to != std::string_view::npos, DataError, "page: it has no '{}'",
                mark);
  return {html.substr(0, from), html.substr(to + end.size())};
}

}  // namespace

std::string page_of(std::string_view html, std::initializer_list<std::string_view> css,
                    std::initializer_list<std::string_view> js, const OrderedJson& data) {
  const auto [head, after_style] = around(html, "<link rel=\"stylesheet\"", ">");
  const auto [body, after_data] = around(after_style, "<script id=\"data\" type=\"application/json\">", "</script>");
  const auto [between, tail] = around(after_data, "<script src=", "</script>");
  return fmt::format(
      "{}<style>\n{}\n{}</style>{}<script id=\"data\" type=\"application/json\">{}</script>{}<script>\n{}"
      "\n{}</script>{}",
      head, kPageCss, fmt::join(css, "\n"), body, script_safe(data), between, kPageJs, fmt::join(js, "\n"), tail);
}

}  // namespace moesaic::eval
