#pragma once

namespace moesaic {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace moesaic
