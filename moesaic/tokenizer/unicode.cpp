#include "moesaic/tokenizer/unicode.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "moesaic/tokenizer/bridge_call.h"

namespace moesaic::tokenizer {
namespace {

// White space of more than one byte: U+0085, U+00A0, U+1680, U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F, U+3000.
constexpr std::string_view kWideSpaces[] = {"\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003",
                                            "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
                                            "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};

}  // namespace

size_t leading_space(std::string_view text) {
  if (text.empty()) return 0;
  const auto first = static_cast<unsigned char>(text.front());
  if (first < 0x80) return first == ' ' || (first >= 0x09 && first <= 0x0d) || (first >= 0x1c && first <= 0x1f);
  const auto* found = std::find_if(std::begin(kWideSpaces), std::end(kWideSpaces),
                                   [&](std::string_view space) { return text.starts_with(space); });
  return found == std::end(kWideSpaces) ? 0 : found->size();
}

std::string lowercase(std::string_view text) { return OwnedText(bridge_lowercase(text.data(), text.size())).str(); }

std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  while (!text.empty()) {
    const size_t space = leading_space(text);
    if (space == 0) word += text.front();
    if (space > 0 && !word.empty()) words.push_back(std::exchange(word, {}));
    text.remove_prefix(std::max<size_t>(space, 1));
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

}  // namespace moesaic::tokenizer
