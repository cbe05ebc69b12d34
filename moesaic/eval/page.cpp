#include "moesaic/eval/page.h"

namespace moesaic::eval {

std::string page_with(const char* head, const OrderedJson& data, const char* tail) {
  std::string json = data.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  // "</" would end the script element; JSON allows the escaped slash.
  for (size_t at = 0; (at = json.find("</", at)) != std::string::npos; at += 3) json.insert(at + 1, "\\");
  // "<!--" would open a comment in it.
  for (size_t at = 0; (at = json.find("<!--", at)) != std::string::npos; at += 9) json.replace(at, 1, "\\u003c");
  return head + json + tail;
}

}  // namespace moesaic::eval
