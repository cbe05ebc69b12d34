// The files of pages/, as the build put them into the program (cmake/Embed.cmake).
#pragma once
#include <string_view>

namespace moesaic::run {

extern const std::string_view kReportHtml, kReportJs;
extern const std::string_view kCompareHtml, kCompareJs;

}  // namespace moesaic::run
