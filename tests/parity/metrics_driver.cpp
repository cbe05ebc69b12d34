// Scores texts: {"metric", "answers": [text], "references": [[text]]} -> {"ok", "score"}.
#include "moesaic/eval/corpus_metrics.h"
#include "tests/parity/answer_lines.h"

int main() {
  using namespace moesaic;
  return test::answer_lines([](const Json& job) {
    const auto answers = job.at("answers").get<std::vector<std::string>>();
    const auto references = job.at("references").get<std::vector<eval::References>>();
    const std::string metric = job.at("metric");
    double score = 0;
    if (metric == "bleu") score = eval::bleu(answers, references);
    if (metric == "chrf") score = eval::chrf(answers, references, job.at("beta").get<double>());
    if (metric == "codexglue_bleu") score = eval::codexglue_bleu(answers, references);
    return Json{{"ok", true}, {"score", score}};
  });
}
