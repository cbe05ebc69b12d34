// How good an answer is: exact match, token F1, ROUGE-L and the number in it; and means with their standard errors.
#pragma once
#include <string>
#include <vector>

namespace moesaic::eval {

/// 1 when the answer is one of the references, whitespace at the ends and runs of it apart.
double exact_match(const std::string& answer, const std::vector<std::string>& references);

/// Lower case, ASCII punctuation and the articles a, an, the removed, runs of whitespace one space.
/// Source: the SQuAD evaluation script.
std::string normalize_squad(const std::string& text);

/// F1 of the bags of words after normalize_squad, the best over the references. Where nothing is left of both (answers
/// like "A"), 1 if they are equal and else 0.
double token_f1(const std::string& answer, const std::vector<std::string>& references);

/// F1 of the longest common subsequence of words, the best over the references. Words are runs of a-z and 0-9 after
/// lower-casing, without stemming, as the rouge_score package's rougeL.
/// Differs: texts without such a word (other alphabets) are compared by whitespace words.
double rouge_l(const std::string& answer, const std::vector<std::string>& references);

/// The last number in a text as written, without `,` and `$` and a full stop behind it; "" when there is none.
std::string last_number(const std::string& text);

/// 1 when the last number of the answer is one of the references, which are numbers, as text: "5.0" is not "5".
/// Source: lm-evaluation-harness's gsm8k, exact_match with the filter flexible-extract.
double number_match(const std::string& answer, const std::vector<std::string>& references);

/// lm-evaluation-harness's exact_match of its mgsm_direct tasks, case and ASCII punctuation apart ("-2.5" is "25"),
/// behind its filter flexible-extract (the last number) or remove_whitespace (the answer without the blanks around it).
double flexible_extract(const std::string& answer, const std::vector<std::string>& references);
double remove_whitespace(const std::string& answer, const std::vector<std::string>& references);

/// A mean of per-question values and its standard error, sample deviation / sqrt(n) (NaN for one value).
struct Mean {
  double value = 0, standard_error = 0;
};
Mean mean_of(const std::vector<double>& values);
/// The median; the mean of the middle two for an even number. Values must not be empty.
double median_of(std::vector<double> values);

}  // namespace moesaic::eval
