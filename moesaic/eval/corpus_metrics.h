// Figures of a whole task rather than means over its questions: chrF and BLEU as sacrebleu computes them, smoothed
// BLEU-4 as CodeXGLUE's code-to-text does. All are 0 to 100.
#pragma once
#include <string>
#include <vector>

namespace moesaic::eval {

/// Accepted texts for one answer, at least one.
using References = std::vector<std::string>;

/// chrF, character n-grams of order 1 to 6 without whitespace, no word n-grams:
///
///   P, R = mean over the orders that occur in both texts of (n-grams in common / n-grams of the answer, the reference)
///   F    = (1 + beta^2) P R / (beta^2 P + R)
///
/// Counts are summed over the answers, each with the reference of the highest F.
/// Source: Popovic 2015; sacrebleu 2.6 `chrF2` (beta 2, its default) and `chrF1`.
double chrf(const std::vector<std::string>& answers, const std::vector<References>& references, double beta = 2);

/// BLEU-4 of the corpus, tokenizer 13a, case kept, smoothing exp: an order without a match counts 1 / 2^k, k the number
/// of such orders so far. The reference length is the closest one. Source: sacrebleu 2.6, its defaults.
double bleu(const std::vector<std::string>& answers, const std::vector<References>& references);

/// Mean over the answers of BLEU-4 with one added to matches and totals from order 2 on, lower-cased, every punctuation
/// mark a token, the shortest reference's length (with one added to both lengths).
/// Source: microsoft/CodeXGLUE:Code-Text/code-to-text/evaluator/evaluator.py.
/// Differs: beyond ASCII, letters and digits are those of the C library's C.UTF-8 locale, not Python's `\w`; tabs and
/// line breaks within an answer are blanks (the script reads one line each, up to a tab).
double codexglue_bleu(const std::vector<std::string>& answers, const std::vector<References>& references);

}  // namespace moesaic::eval
