// What messages about files have in common: why the system refused something, and that a file ends early.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace moesaic {

/// What the system said no with, and what helps: "No space left on device\nhint: ...". `error`: an errno.
std::string refusal(int error);

/// The message of a file system's error: where, what couldn't be done, why, and what helps.
std::string message_of(const std::filesystem::filesystem_error& error);

/// "the file is truncated: 90 bytes are there, 10 are missing\nhint: ..."; `missing` 0: how many isn't known.
std::string ends_early(uint64_t bytes, uint64_t missing = 0);

}  // namespace moesaic
