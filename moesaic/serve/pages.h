// The files of pages/, as the build put them into the program (cmake/Embed.cmake).
#pragma once
#include <string_view>

namespace moesaic::serve {

extern const std::string_view kServeHtml;

}  // namespace moesaic::serve
