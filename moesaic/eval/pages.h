// The files of pages/, as the build put them into the program (cmake/Embed.cmake).
#pragma once
#include <string_view>

namespace moesaic::eval {

extern const std::string_view kPageCss, kPageJs;              // of all pages
extern const std::string_view kUplotCss, kUplotJs, kPlotsJs;  // of pages with curves
extern const std::string_view kRoutesHtml, kRoutesCss, kRoutesJs;
extern const std::string_view kSuiteHtml, kSuiteJs;

}  // namespace moesaic::eval
