// Texts by Unicode's rules, as Python's str methods have them.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace moesaic::tokenizer {

/// Bytes of the white space character, as str.isspace() has it, that `text` begins with; 0 when it begins with none.
size_t leading_space(std::string_view text);
/// str.lower().
std::string lowercase(std::string_view text);
/// str.split(): the words between stretches of white space.
std::vector<std::string> split_words(std::string_view text);

}  // namespace moesaic::tokenizer
