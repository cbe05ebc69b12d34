// One task through one model: every question answered or ranked, scored, and its routing counted.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/eval/metrics.h"
#include "moesaic/eval/rank.h"
#include "moesaic/eval/task.h"
#include "moesaic/moe/routing_stats.h"
#include "moesaic/ranks/group.h"

namespace moesaic::eval {

/// What is evaluated.
struct EvalModel {
  models::LanguageModel& model;
  const tokenizer::Tokenizer& tokenizer;
  const tokenizer::ChatTemplate* chat_template = nullptr;  // nullptr: none
};

struct EvalOptions {
  int64_t batch_size = 0;                  // questions side by side; 0 = as many as fit a fixed number of tokens
  bool apply_chat_template = false;        // else the bare text of a single user message
  std::string target_delimiter = " ";      // between prompt and choice, where the task has none of its own
  bool delimiter_said = false;             // this one, whatever the task has
  bool score_eos = false;                  // the EOS behind a choice counts (T0's rule; harness: it does not)
  generate::SamplingOptions generation{};  // for tasks whose answers are generated; max_new_tokens 0: the task's own
  std::vector<std::string> metrics{};      // of generated answers; empty: the task's own
  int64_t bootstrap_iters = 0;             // above 0: bleu and chrf get a standard error, of at most 100 resamples
  bool keep_samples = true;                // else of each question its hash alone
  bool run_code = false;                   // the user agrees that programs a model wrote are run (metric pass@1)
  std::shared_ptr<ranks::Group> group = std::make_shared<ranks::Group>();  // divides the questions; each gets it all
};

/// Everything known about one task afterwards.
struct TaskResult {
  std::string name;
  bool ranked = false;
  int64_t questions = 0, available = 0;
  std::map<std::string, Mean> metrics;                          // acc, acc_norm; or exact_match, f1, rougeL, ...
  std::map<std::string, Mean> corpus_metrics;                   // bleu, chrf, ...: one figure for all answers
  std::map<std::string, std::map<std::string, Mean>> variants;  // the same per prompt template, when there are any
  std::map<std::string, double> variant_median;                 // median over the templates
  int64_t ties = 0;                  // questions whose best choices scored equally; the first one counts
  std::vector<OrderedJson> samples;  // lm-evaluation-harness's sample rows
  moe::RoutingStats routing;         // of every router, when there are any
  double seconds = 0;
};

/// Asks as a run renders its training data: through the chat template where there is one, else with nothing between
/// prompt and answer.
void ask_as_trained(const EvalModel& model, EvalOptions& options);

/// Called with the number of questions done.
using ProgressCallback = std::function<void(int64_t done)>;

/// Throws UsageError for a metric that is unknown or does not fit the task, and when pass@1 would run programs unasked.
/// To be called before a model is loaded; evaluate() calls it too.
void check_metrics(const Task& task, const EvalOptions& options);

/// The names of what evaluate() will measure of the task.
std::vector<std::string> metric_names(const Task& task, const EvalOptions& options);

/// The metrics that a task may have whose answers are generated.
std::vector<std::string> generated_metrics();

/// What stands between prompt and choice: nothing with a chat template.
std::string delimiter_of(const Task& task, const EvalOptions& options);

/// How the answers to a task are generated: the options, filled up with the task's own length and stops.
generate::SamplingOptions sampling_of(const Task& task, const EvalOptions& options);

/// The prompt of an item as text, and whether the tokenizer shall add its special tokens to it.
/// Throws UsageError when a conversation needs a chat template.
std::pair<std::string, bool> prompt_text(const EvalModel& model, const Item& item, bool apply_chat_template);

/// The item's sentence vector where a router reads one of a data column, else none.
std::vector<float> sentence_of(const EvalModel& model, const Item& item);

/// Scores do not depend on the batch size beyond float rounding: batches are ragged.
TaskResult evaluate(const EvalModel& model, const Task& task, const EvalOptions& options,
                    const ProgressCallback& progress = nullptr);

}  // namespace moesaic::eval
