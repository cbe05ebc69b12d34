// Scores texts: {"metric", "answers": [text], "references": [[text]]} -> {"ok", "score"}; with "resamples" the standard
// error of it, of so many.
#include "moesaic/eval/bootstrap.h"
#include "moesaic/eval/corpus_metrics.h"
#include "moesaic/eval/metrics.h"
#include "tests/parity/answer_lines.h"

int main() {
  using namespace moesaic;
  return test::answer_lines([](const Json& job) {
    const auto answers = job.at("answers").get<std::vector<std::string>>();
    const auto references = job.at("references").get<std::vector<eval::References>>();
    const std::string metric = job.at("metric");
    auto score_of = [&](const std::vector<std::string>& answers, const std::vector<eval::References>& references) {
      if (metric == "bleu") return eval::bleu(answers, references);
      if (metric == "chrf") return eval::chrf(answers, references, job.at("beta").get<double>());
      if (metric == "codexglue_bleu") return eval::codexglue_bleu(answers, references);
      if (metric == "flexible-extract") return eval::flexible_extract(answers.at(0), references.at(0));
      return eval::remove_whitespace(answers.at(0), references.at(0));
    };
    if (!job.contains("resamples")) return Json{{"ok", true}, {"score", score_of(answers, references)}};
    const double error = eval::bootstrap_error(answers.size(), job["resamples"], [&](const std::vector<size_t>& rows) {
      std::vector<std::string> drawn;
      std::vector<eval::References> known;
      for (const size_t row : rows) {
        drawn.push_back(answers[row]);
        known.push_back(references[row]);
      }
      return score_of(drawn, known);
    });
    return Json{{"ok", true}, {"score", error}};
  });
}
