#include "moesaic/eval/metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <sstream>

#include "moesaic/tokenizer/unicode.h"

namespace moesaic::eval {
namespace {

bool is_ascii(char c) { return static_cast<unsigned char>(c) < 128; }
char lower(char c) { return is_ascii(c) ? static_cast<char>(std::tolower(static_cast<unsigned char>(c))) : c; }

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

double f1(double common, size_t answer, size_t reference) {
  return common == 0 ? 0 : 2 * common / static_cast<double>(answer + reference);
}

double best(const std::string& answer, const std::vector<std::string>& references,
            const std::function<double(const std::string&, const std::string&)>& score) {
  double highest = 0;
  for (const std::string& reference : references) highest = std::max(highest, score(answer, reference));
  return highest;
}

std::string lower_without_punctuation(const std::string& text) {
  std::string kept;
  for (char c : tokenizer::lowercase(text)) {
    if (!is_ascii(c) || !std::ispunct(static_cast<unsigned char>(c))) kept += c;
  }
  return kept;
}

double same_but_punctuation(const std::string& a, const std::string& b) {
  return lower_without_punctuation(a) == lower_without_punctuation(b) ? 1.0 : 0.0;
}

/// The last match of  -?[$0-9.,]{2,} | -?[0-9]+  read from the left; "" when there is none.
std::string last_match(const std::string& text) {
  auto numeric = [](char c) { return std::string_view("$.,0123456789").find(c) != std::string_view::npos; };
  std::string match;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i + (text[i] == '-' ? 1 : 0);
    size_t end = begin;
    while (end < text.size() && numeric(text[end])) ++end;
    const bool found = end - begin >= 2 || (end - begin == 1 && std::isdigit(static_cast<unsigned char>(text[begin])));
    if (found) match = text.substr(i, end - i);
    i = found ? end : i + 1;
  }
  return match;
}

std::vector<std::string> rouge_words(const std::string& text) {
  std::string kept;
  for (char c : text) kept += is_ascii(c) && std::isalnum(static_cast<unsigned char>(c)) ? lower(c) : ' ';
  return words_of(kept);
}

size_t longest_common_subsequence(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  std::vector<size_t> row(b.size() + 1, 0);
  for (const std::string& word : a) {
    size_t diagonal = 0;  // row[j] of the previous word
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t above = row[j + 1];
      row[j + 1] = word == b[j] ? diagonal + 1 : std::max(row[j + 1], row[j]);
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

double exact_match(const std::string& answer, const std::vector<std::string>& references) {
  return best(answer, references, [](const std::string& a, const std::string& b) {
    return join(words_of(a)) == join(words_of(b)) ? 1.0 : 0.0;
  });
}

std::string normalize_squad(const std::string& text) {
  std::vector<std::string> words = tokenizer::split_words(lower_without_punctuation(text));
  std::erase_if(words, [](const std::string& word) { return word == "a" || word == "an" || word == "the"; });
  return join(words);
}

double token_f1(const std::string& answer, const std::vector<std::string>& references) {
  return best(answer, references, [](const std::string& a, const std::string& b) {
    const std::vector<std::string> left = tokenizer::split_words(normalize_squad(a)),
                                   right = tokenizer::split_words(normalize_squad(b));
    if (left.empty() && right.empty()) return join(words_of(a)) == join(words_of(b)) ? 1.0 : 0.0;
    std::map<std::string, int> counts;
    for (const std::string& word : right) ++counts[word];
    double common = 0;
    for (const std::string& word : left) common += counts[word]-- > 0;
    return f1(common, left.size(), right.size());
  });
}

double rouge_l(const std::string& answer, const std::vector<std::string>& references) {
  return best(answer, references, [](const std::string& a, const std::string& b) {
    std::vector<std::string> left = rouge_words(a), right = rouge_words(b);
    if (right.empty()) {
      left = words_of(a);
      right = words_of(b);
    }
    return f1(static_cast<double>(longest_common_subsequence(left, right)), left.size(), right.size());
  });
}

std::string last_number(const std::string& text) {
  std::string number = last_match(text);
  std::erase_if(number, [](char c) { return c == ',' || c == '$'; });
  if (number.ends_with('.')) number.pop_back();
  return number;
}

double number_match(const std::string& answer, const std::vector<std::string>& references) {
  const std::string number = last_number(answer);
  return !number.empty() && std::find(references.begin(), references.end(), number) != references.end() ? 1 : 0;
}

double flexible_extract(const std::string& answer, const std::vector<std::string>& references) {
  std::string match = last_match(answer);
  if (match.empty()) match = "[invalid]";
  return best(match, references, same_but_punctuation);
}

double remove_whitespace(const std::string& answer, const std::vector<std::string>& references) {
  std::string_view rest = answer;
  while (const size_t blank = tokenizer::leading_space(rest)) rest.remove_prefix(blank);
  size_t end = 0;
  for (size_t at = 0; at < rest.size();) {
    const size_t blank = tokenizer::leading_space(rest.substr(at));
    at += std::max<size_t>(blank, 1);
    if (blank == 0) end = at;
  }
  return best(std::string(rest.substr(0, end)), references, same_but_punctuation);
}

Mean mean_of(const std::vector<double>& values) {
  if (values.empty()) return {};
  const double n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  if (values.size() == 1) return {mean, std::numeric_limits<double>::quiet_NaN()};
  double squares = 0;
  for (double value : values) squares += (value - mean) * (value - mean);
  return {mean, std::sqrt(squares / (n - 1) / n)};
}

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace moesaic::eval
