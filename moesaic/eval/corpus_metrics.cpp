#include "moesaic/eval/corpus_metrics.h"

#include <clocale>
#include <cwctype>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <unordered_map>

namespace moesaic::eval {
namespace {

constexpr int kChrfOrder = 6;
constexpr int kBleuOrder = 4;

/// Code points of UTF-8 text; a byte that belongs to none stands for itself, beyond Unicode.
std::u32string code_points(std::string_view text) {
  std::u32string result;
  for (size_t i = 0; i < text.size();) {
    const unsigned char first = static_cast<unsigned char>(text[i]);
    const size_t length = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 : first >> 3 == 30 ? 4 : 0;
    bool valid = length > 0 && i + length <= text.size();
    char32_t point = length <= 1 ? first : first & (0x7F >> length);
    for (size_t k = 1; valid && k < length; ++k) {
      valid = (static_cast<unsigned char>(text[i + k]) & 0xC0) == 0x80;
      point = point << 6 | (text[i + k] & 0x3F);
    }
    result += valid ? point : 0x110000 + first;
    i += valid ? length : 1;
  }
  return result;
}

/// What Python's str.split() splits at.
bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string replace_all(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

using Token = std::u32string;

std::vector<Token> split(const std::u32string& text) {
  std::vector<Token> tokens;
  bool inside = false;
  for (char32_t c : text) {
    if (is_space(c)) {
      inside = false;
    } else if (inside) {
      tokens.back() += c;
    } else {
      tokens.emplace_back(1, c);
      inside = true;
    }
  }
  return tokens;
}

/// Puts `before`, `between` and `after` around every two neighbours a, b that fit, from left to right without overlap.
template <class First, class Second>
std::string space_pairs(const std::string& text, First first, Second second, const char* before, const char* between,
                        const char* after) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    if (i + 1 < text.size() && first(text[i]) && second(text[i + 1])) {
      result += before;
      result += text[i];
      result += between;
      result += text[++i];
      result += after;
    } else {
      result += text[i];
    }
  }
  return result;
}

/// The tokenizer of mteval-v13a, the WMT's.
std::vector<Token> tokens_13a(const std::string& line) {
  std::string text = line;
  // Trailing whitespace goes first, so that a hyphen at the very end is none that joins lines.
  std::u32string points = code_points(text);
  while (!points.empty() && is_space(points.back())) {
    const char32_t c = points.back();
    text.resize(text.size() - (c < 0x80 ? 1 : c < 0x800 ? 2 : 3));
    points.pop_back();
  }
  text = replace_all(replace_all(replace_all(text, "<skipped>", ""), "-\n", ""), "\n", " ");
  text = replace_all(replace_all(text, "&quot;", "\""), "&amp;", "&");
  text = " " + replace_all(replace_all(text, "&lt;", "<"), "&gt;", ">") + " ";

  std::string spaced;  // ASCII punctuation but ' , - .
  for (char c : text) {
    const bool mark = (c >= '{' && c <= '~') || (c >= '[' && c <= '`') || (c >= ' ' && c <= '&') ||
                      (c >= '(' && c <= '+') || (c >= ':' && c <= '@') || c == '/';
    spaced += mark ? std::string{' ', c, ' '} : std::string{c};
  }
  // A byte of a character outside ASCII is no digit either, so bytes give what code points would.
  auto no_digit = [](char c) { return !is_digit(c); };
  auto stop = [](char c) { return c == '.' || c == ','; };
  text = space_pairs(spaced, no_digit, stop, "", " ", " ");
  text = space_pairs(text, stop, no_digit, " ", " ", "");
  text = space_pairs(text, is_digit, [](char c) { return c == '-'; }, "", " ", " ");
  return split(code_points(text));
}

/// Lower-cased words, and every mark a token of its own.
std::vector<Token> tokens_codexglue(const std::string& text) {
  static const locale_t unicode = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);  // null where the C library lacks it
  std::vector<Token> tokens;
  bool in_word = false;
  for (char32_t c : code_points(text)) {
    if (is_space(c)) {
      in_word = false;
      continue;
    }
    bool word = c >= 0x80;
    if (c < 0x80) {
      c = static_cast<char32_t>(std::tolower(static_cast<int>(c)));
      word = std::isalnum(static_cast<int>(c));
    } else if (unicode) {
      c = towlower_l(c, unicode);
      word = iswalnum_l(c, unicode);
    }
    if (word && in_word) {
      tokens.back() += c;
    } else {
      tokens.emplace_back(1, c);
    }
    in_word = word;
  }
  return tokens;
}

/// n-grams of one order and how often each occurs.
using Counts = std::unordered_map<std::u32string, int64_t>;

Counts char_ngrams(const std::u32string& text, size_t order) {
  Counts counts;
  for (size_t i = 0; i + order <= text.size(); ++i) ++counts[text.substr(i, order)];
  return counts;
}

Counts token_ngrams(const std::vector<Token>& tokens, size_t order) {
  Counts counts;
  for (size_t i = 0; i + order <= tokens.size(); ++i) {
    Token joined = tokens[i];
    for (size_t k = 1; k < order; ++k) (joined += U' ') += tokens[i + k];  // no token holds a blank
    ++counts[joined];
  }
  return counts;
}

int64_t total(const Counts& counts) {
  int64_t sum = 0;
  for (const auto& [ngram, count] : counts) sum += count;
  return sum;
}

int64_t common(const Counts& a, const Counts& b) {
  int64_t sum = 0;
  for (const auto& [ngram, count] : a) {
    if (auto found = b.find(ngram); found != b.end()) sum += std::min(count, found->second);
  }
  return sum;
}

struct CharMatches {
  std::array<int64_t, kChrfOrder> answer{}, reference{}, common{};

  double f_score(double beta) const {
    double precision = 0, recall = 0;
    int orders = 0;
    for (int n = 0; n < kChrfOrder; ++n) {
      if (answer[n] == 0 || reference[n] == 0) continue;
      precision += static_cast<double>(common[n]) / static_cast<double>(answer[n]);
      recall += static_cast<double>(common[n]) / static_cast<double>(reference[n]);
      ++orders;
    }
    if (precision + recall == 0) return 0;
    precision /= orders;
    recall /= orders;
    const double factor = beta * beta;
    return 100 * (1 + factor) * precision * recall / (factor * precision + recall);
  }
};

/// Matches and lengths of one answer, or of many summed up.
struct TokenMatches {
  std::array<int64_t, kBleuOrder> common{}, total{};
  int64_t answer_length = 0, reference_length = 0;
};

TokenMatches match_tokens(const std::vector<Token>& answer, const std::vector<std::vector<Token>>& references) {
  TokenMatches matches;
  matches.answer_length = std::ssize(answer);
  for (int n = 0; n < kBleuOrder; ++n) {
    Counts most;  // of each n-gram in any reference
    for (const std::vector<Token>& reference : references) {
      for (const auto& [ngram, count] : token_ngrams(reference, n + 1)) most[ngram] = std::max(most[ngram], count);
    }
    const Counts counts = token_ngrams(answer, n + 1);
    matches.total[n] = eval::total(counts);
    matches.common[n] = eval::common(counts, most);
  }
  return matches;
}

std::u32string without_spaces(const std::string& text) {
  std::u32string points = code_points(text);
  std::erase_if(points, is_space);
  return points;
}

template <class Tokenize>
std::vector<std::vector<Token>> tokenize_all(const References& texts, Tokenize tokenize) {
  std::vector<std::vector<Token>> result;
  for (const std::string& text : texts) result.push_back(tokenize(text));
  return result;
}

}  // namespace

double chrf(const std::vector<std::string>& answers, const std::vector<References>& references, double beta) {
  CharMatches sum;
  for (size_t i = 0; i < answers.size(); ++i) {
    std::array<Counts, kChrfOrder> answer;
    const std::u32string text = without_spaces(answers[i]);
    for (int n = 0; n < kChrfOrder; ++n) answer[n] = char_ngrams(text, n + 1);
    CharMatches best;
    double highest = -1;
    for (const std::string& accepted : references[i]) {
      const std::u32string reference = without_spaces(accepted);
      CharMatches matches;
      for (int n = 0; n < kChrfOrder; ++n) {
        const Counts counts = char_ngrams(reference, n + 1);
        matches.answer[n] = counts.empty() ? 0 : total(answer[n]);
        matches.reference[n] = total(counts);
        matches.common[n] = common(answer[n], counts);
      }
      if (const double score = matches.f_score(beta); score > highest) {
        highest = score;
        best = matches;
      }
    }
    for (int n = 0; n < kChrfOrder; ++n) {
      sum.answer[n] += best.answer[n];
      sum.reference[n] += best.reference[n];
      sum.common[n] += best.common[n];
    }
  }
  return sum.f_score(beta);
}

double bleu(const std::vector<std::string>& answers, const std::vector<References>& references) {
  TokenMatches sum;
  for (size_t i = 0; i < answers.size(); ++i) {
    const std::vector<std::vector<Token>> accepted = tokenize_all(references[i], tokens_13a);
    const TokenMatches matches = match_tokens(tokens_13a(answers[i]), accepted);
    int64_t closest = std::ssize(accepted[0]);
    for (const std::vector<Token>& reference : accepted) {
      const int64_t length = std::ssize(reference);
      const int64_t distance = std::abs(length - matches.answer_length);
      const int64_t least = std::abs(closest - matches.answer_length);
      if (distance < least || (distance == least && length < closest)) closest = length;
    }
    sum.answer_length += matches.answer_length;
    sum.reference_length += closest;
    for (int n = 0; n < kBleuOrder; ++n) {
      sum.common[n] += matches.common[n];
      sum.total[n] += matches.total[n];
    }
  }
  if (std::ranges::all_of(sum.common, [](int64_t count) { return count == 0; })) return 0;
  double log_precision = 0, smoothing = 1;
  for (int n = 0; n < kBleuOrder; ++n) {
    if (sum.total[n] == 0) return 0;
    const double matched = sum.common[n] > 0 ? static_cast<double>(sum.common[n]) : 1 / (smoothing *= 2);
    log_precision += std::log(100 * matched / static_cast<double>(sum.total[n])) / kBleuOrder;
  }
  const double ratio = static_cast<double>(sum.reference_length) / static_cast<double>(sum.answer_length);
  return std::exp(log_precision + std::min(0.0, 1 - ratio));
}

double codexglue_bleu(const std::vector<std::string>& answers, const std::vector<References>& references) {
  constexpr double kTiny = std::numeric_limits<double>::min();  // keeps the logarithm of no match finite
  double sum = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    const std::vector<std::vector<Token>> accepted = tokenize_all(references[i], tokens_codexglue);
    const TokenMatches matches = match_tokens(tokens_codexglue(answers[i]), accepted);
    size_t shortest = accepted[0].size();
    for (const std::vector<Token>& reference : accepted) shortest = std::min(shortest, reference.size());
    double log_precision = 0;
    for (int n = 0; n < kBleuOrder; ++n) {
      const double added = (n > 0 ? 1 : 0) + kTiny;
      log_precision += (std::log(static_cast<double>(matches.common[n]) + added) -
                        std::log(static_cast<double>(matches.total[n]) + added)) /
                       kBleuOrder;
    }
    const double ratio = static_cast<double>(shortest + 1) / static_cast<double>(matches.answer_length + 1);
    sum += std::exp(log_precision + std::min(0.0, 1 - ratio));
  }
  return answers.empty() ? 0 : 100 * sum / static_cast<double>(answers.size());
}

}  // namespace moesaic::eval
