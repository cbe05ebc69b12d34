// The files of sandbox/, as the build put them into the program (cmake/Embed.cmake).
#pragma once
#include <string_view>

namespace moesaic::eval {

extern const std::string_view kValuesPy, kProgramPy, kTestsPy;

}  // namespace moesaic::eval
