#include "moesaic/eval/evaluate.h"

#include <chrono>

#include "moesaic/base/sha256.h"
#include "moesaic/base/text.h"
#include "moesaic/eval/bootstrap.h"
#include "moesaic/eval/code_runner.h"
#include "moesaic/eval/corpus_metrics.h"
#include "moesaic/ranks/deal.h"

namespace moesaic::eval {
namespace {

constexpr int64_t kAutoBatchTokens = 4096;

std::string dump(const OrderedJson& json) { return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace); }

/// Characters (code points) of UTF-8 text.
int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

/// A metric of each generated answer.
struct AnswerMetric {
  const char* name;
  double (*score)(const std::string& answer, const std::vector<std::string>& references);
};
constexpr AnswerMetric kAnswerMetrics[] = {{"exact_match", exact_match},
                                           {"f1", token_f1},
                                           {"rougeL", rouge_l},
                                           {"number", number_match},
                                           {"flexible-extract", flexible_extract},
                                           {"remove_whitespace", remove_whitespace}};

/// A metric of all answers of a task together.
struct CorpusMetric {
  const char* name;
  double (*score)(const std::vector<std::string>& answers, const std::vector<References>& references);
  bool in_harness = false;  // lm-evaluation-harness has it, and knows its standard error
};
constexpr CorpusMetric kCorpusMetrics[] = {
    {"bleu", bleu, true},
    {"chrf", [](const auto& answers, const auto& references) { return chrf(answers, references, 2); }, true},
    {"chrf1", [](const auto& answers, const auto& references) { return chrf(answers, references, 1); }},
    {"codexglue_bleu", codexglue_bleu}};

constexpr int64_t kMostResamples = 100;  // of a corpus, as in the harness

constexpr const char* kPassAt1 = "pass@1";
constexpr const char* kRankedMetrics[] = {"acc", "acc_norm"};  // by the sum of log-probabilities; per character

const std::vector<std::string>& metrics_of(const Task& task, const EvalOptions& options) {
  return options.metrics.empty() ? task.metrics : options.metrics;
}

bool wanted(const std::vector<std::string>& metrics, const char* name) {
  return std::find(metrics.begin(), metrics.end(), name) != metrics.end();
}

/// Metric values per question, and their means over all and per variant.
class Scores {
 public:
  void add(const std::string& variant, const std::map<std::string, double>& values) {
    for (const auto& [metric, value] : values) {
      all_[metric].push_back(value);
      if (!variant.empty()) variants_[variant][metric].push_back(value);
    }
  }
  void finish(TaskResult& result) const {
    for (const auto& [metric, values] : all_) result.metrics[metric] = mean_of(values);
    std::map<std::string, std::vector<double>> means;
    for (const auto& [variant, metrics] : variants_) {
      for (const auto& [metric, values] : metrics) {
        result.variants[variant][metric] = mean_of(values);
        means[metric].push_back(mean_of(values).value);
      }
    }
    for (const auto& [metric, values] : means) result.variant_median[metric] = median_of(values);
  }

 private:
  std::map<std::string, std::vector<double>> all_;
  std::map<std::string, std::map<std::string, std::vector<double>>> variants_;
};

/// What is left of a sample row where none are kept.
OrderedJson hash_row(const Item& item) { return {{"doc_hash", sha256_hex(dump(item.doc))}}; }

OrderedJson sample_row(size_t index, const Item& item, const std::string& prompt,
                       const std::map<std::string, double>& values) {
  OrderedJson metrics = OrderedJson::array();
  for (const auto& entry : values) metrics.push_back(entry.first);
  OrderedJson row = {{"doc_id", index},
                     {"doc", item.doc},
                     {"target", item.targets.size() == 1 ? OrderedJson(item.targets[0]) : OrderedJson(item.targets)},
                     {"filter", "none"},
                     {"metrics", metrics},
                     {"doc_hash", hash_row(item)["doc_hash"]},
                     {"prompt_hash", sha256_hex(prompt)},
                     {"target_hash", sha256_hex(dump(item.targets))}};
  if (!item.variant.empty()) row["template"] = item.variant;
  for (const auto& [metric, value] : values) row[metric] = value;
  return row;
}

/// Questions as they are answered: consecutive ones, by number or by tokens.
std::vector<std::pair<size_t, size_t>> batches(const std::vector<int64_t>& tokens, int64_t batch_size) {
  std::vector<std::pair<size_t, size_t>> result;
  size_t begin = 0;
  int64_t sum = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const bool full =
        batch_size > 0 ? static_cast<int64_t>(i - begin) >= batch_size : sum + tokens[i] > kAutoBatchTokens;
    if (i > begin && full) {
      result.emplace_back(begin, i);
      begin = i;
      sum = 0;
    }
    sum += tokens[i];
  }
  result.emplace_back(begin, tokens.size());
  return result;
}

/// One batch of questions, [begin, end): a row of each, in order. Its routing goes to the callback.
using RunBatch = std::function<Json(size_t begin, size_t end, const generate::RoutingCallback& routing)>;

/// The rows of all questions, whichever rank runs their batches, and the routing of all, added batch by batch.
std::vector<Json> run_batches(const EvalModel& model, const EvalOptions& options, const std::vector<int64_t>& tokens,
                              const RunBatch& run, const ProgressCallback& progress, TaskResult& result) {
  const std::vector<std::pair<size_t, size_t>> all = batches(tokens, options.batch_size);
  std::vector<Json> rows;
  const std::vector<Json> done = ranks::deal(*options.group, std::ssize(all), [&](int64_t b) -> Json {
    moe::RoutingStats routed;
    generate::RoutingCallback routing;
    if (model.model.needs().routed) routing = [&](const auto& records, const auto&) { routed.add(records); };
    Json of_batch = run(all[b].first, all[b].second, routing);
    if (progress) progress(static_cast<int64_t>(all[b].second));
    return {{"rows", std::move(of_batch)}, {"routing", routed.sums()}};
  });
  for (const Json& batch : done) {
    result.routing.add(batch["routing"]);
    rows.insert(rows.end(), batch["rows"].begin(), batch["rows"].end());
  }
  return rows;
}

void evaluate_ranked(const EvalModel& model, const Task& task, const EvalOptions& options, TaskResult& result,
                     const ProgressCallback& progress) {
  std::vector<RankQuestion> questions;
  std::vector<std::string> prompts;
  std::vector<int64_t> tokens;
  const std::string delimiter = delimiter_of(task, options);
  int64_t eos = -1;
  if (options.score_eos || task.score_eos) {
    MOESAIC_CHECK(model.tokenizer.eos_id().has_value(), UsageError, "score_eos of {}: the tokenizer names no EOS token",
                  task.name);
    eos = *model.tokenizer.eos_id();
  }
  for (const Item& item : task.items) {
    const auto [prompt, special] = prompt_text(model, item, options.apply_chat_template);
    std::vector<std::string> choices;
    for (const std::string& choice : item.choices) choices.push_back(delimiter + choice);
    RankQuestion& question = questions.emplace_back(make_rank_question(model.tokenizer, prompt, choices, special, eos));
    question.prompt.sentence = sentence_of(model, item);
    const int64_t length = std::ssize(question.prompt.ids);
    int64_t count = length;
    for (const auto& choice : question.choices) count += length + std::ssize(choice);
    tokens.push_back(count);
    prompts.push_back(prompt);
  }
  auto run = [&](size_t begin, size_t end, const generate::RoutingCallback& routing) {
    Json rows = Json::array();
    for (const auto& choices : rank(model.model, {questions.begin() + begin, questions.begin() + end}, routing)) {
      Json& row = rows.emplace_back(Json::array());
      for (const ChoiceScore& choice : choices) row.push_back({choice.logprob, choice.is_greedy});
    }
    return rows;
  };
  const std::vector<Json> ranked = run_batches(model, options, tokens, run, progress, result);
  Scores scores;
  for (size_t i = 0; i < task.items.size(); ++i) {
    const Item& item = task.items[i];
    std::vector<double> sums, normalised;
    for (size_t c = 0; c < item.choices.size(); ++c) {
      sums.push_back(ranked[i][c][0].get<double>());
      normalised.push_back(sums.back() / static_cast<double>(std::max<int64_t>(1, characters(item.choices[c]))));
    }
    auto right = [&](const Winner& winner) {
      const std::string answer = stripped(item.choices[winner.index]);
      return std::find(item.targets.begin(), item.targets.end(), answer) != item.targets.end() ? 1.0 : 0.0;
    };
    const Winner best = first_largest(sums);
    result.ties += best.tied;
    std::map<std::string, double> values;
    const std::vector<std::string> metrics = metric_names(task, options);
    if (wanted(metrics, "acc")) values["acc"] = right(best);
    if (wanted(metrics, "acc_norm")) values["acc_norm"] = right(first_largest(normalised));
    scores.add(item.variant, values);
    if (!options.keep_samples) {
      result.samples.push_back(hash_row(item));
      continue;
    }
    OrderedJson arguments = OrderedJson::object(), responses = OrderedJson::array(), filtered = OrderedJson::array();
    for (size_t c = 0; c < item.choices.size(); ++c) {
      arguments[fmt::format("gen_args_{}", c)] = {{"arg_0", prompts[i]}, {"arg_1", delimiter + item.choices[c]}};
      const OrderedJson pair = OrderedJson::array({sums[c], ranked[i][c][1].get<bool>()});
      responses.push_back(OrderedJson::array({pair}));
      filtered.push_back(pair);
    }
    OrderedJson row = sample_row(i, item, prompts[i], values);
    row["arguments"] = arguments;
    row["resps"] = responses;
    row["filtered_resps"] = filtered;
    if (best.tied) row["tie"] = true;
    result.samples.push_back(std::move(row));
  }
  scores.finish(result);
}

void evaluate_generated(const EvalModel& model, const Task& task, const EvalOptions& options, TaskResult& result,
                        const ProgressCallback& progress) {
  generate::SamplingOptions sampling = sampling_of(task, options);
  const std::vector<std::string>& metrics = metrics_of(task, options);
  std::optional<CodeRunner> runner;
  if (wanted(metrics, kPassAt1)) runner.emplace();
  std::vector<generate::Prompt> questions;
  std::vector<std::string> prompts;
  std::vector<int64_t> tokens;
  for (const Item& item : task.items) {
    const auto [prompt, special] = prompt_text(model, item, options.apply_chat_template);
    questions.push_back({special ? model.tokenizer.encode_start(prompt).ids : model.tokenizer.encode(prompt, false),
                         sentence_of(model, item)});
    prompts.push_back(prompt);
    tokens.push_back(std::ssize(questions.back().ids) + sampling.max_new_tokens);
  }
  auto run = [&](size_t begin, size_t end, const generate::RoutingCallback& routing) {
    sampling.first = static_cast<int64_t>(begin);  // an answer's draw does not depend on the batch size
    Json rows = Json::array();
    for (const auto& given :
         generate::generate(model.model, model.tokenizer, {questions.begin() + begin, questions.begin() + end},
                            sampling, {.routing = routing})) {
      const Item& item = task.items[begin + rows.size()];
      Json& row = rows.emplace_back(Json::array({given.text}));
      if (runner) row.push_back(runner->run(item.program->before + code_in(given.text), item.program->tests));
    }
    return rows;
  };
  const std::vector<Json> rows = run_batches(model, options, tokens, run, progress, result);
  Scores scores;
  std::vector<std::string> texts;
  std::vector<References> references;
  for (size_t i = 0; i < task.items.size(); ++i) {
    const Item& item = task.items[i];
    const auto& text = rows[i][0].get_ref<const std::string&>();
    // Blanks in front belong to code.
    const std::string answer = item.program ? code_in(text) : stripped(text);
    std::map<std::string, double> values;
    for (const AnswerMetric& metric : kAnswerMetrics) {
      if (wanted(metrics, metric.name)) values[metric.name] = metric.score(answer, item.targets);
    }
    std::optional<Verdict> verdict;
    if (runner) {
      verdict = rows[i][1].get<Verdict>();
      values[kPassAt1] = verdict == Verdict::kPassed ? 1 : 0;
    }
    scores.add(item.variant, values);
    texts.push_back(answer);
    references.push_back(item.targets);
    OrderedJson row = sample_row(i, item, prompts[i], values);
    row["arguments"] = {
        {"gen_args_0",
         {{"arg_0", prompts[i]}, {"arg_1", {{"until", sampling.stop}, {"max_gen_toks", sampling.max_new_tokens}}}}}};
    row["resps"] = OrderedJson::array({OrderedJson::array({text})});
    row["filtered_resps"] = OrderedJson::array({answer});
    if (verdict) row["verdict"] = name_of(*verdict);
    result.samples.push_back(std::move(row));
  }
  scores.finish(result);
  for (const CorpusMetric& metric : kCorpusMetrics) {
    if (!wanted(metrics, metric.name)) continue;
    const int64_t iterations = metric.in_harness ? std::min(options.bootstrap_iters, kMostResamples) : 0;
    const double error = bootstrap_error(texts.size(), iterations, [&](const std::vector<size_t>& rows) {
      std::vector<std::string> drawn;
      std::vector<References> known;
      for (const size_t row : rows) {
        drawn.push_back(texts[row]);
        known.push_back(references[row]);
      }
      return metric.score(drawn, known);
    });
    result.corpus_metrics[metric.name] = {metric.score(texts, references), error};
  }
}

}  // namespace

std::vector<std::string> metric_names(const Task& task, const EvalOptions& options) {
  if (!task.ranked()) return metrics_of(task, options);
  std::vector<std::string> asked;
  for (const char* name : kRankedMetrics) {
    if (wanted(task.metrics, name)) asked.push_back(name);
  }
  return asked.empty() ? std::vector<std::string>(std::begin(kRankedMetrics), std::end(kRankedMetrics)) : asked;
}

std::string delimiter_of(const Task& task, const EvalOptions& options) {
  if (options.apply_chat_template) return "";
  return options.delimiter_said ? options.target_delimiter : task.target_delimiter.value_or(options.target_delimiter);
}

std::vector<std::string> generated_metrics() {
  std::vector<std::string> known{kPassAt1};
  for (const AnswerMetric& metric : kAnswerMetrics) known.push_back(metric.name);
  for (const CorpusMetric& metric : kCorpusMetrics) known.push_back(metric.name);
  return known;
}

void ask_as_trained(const EvalModel& model, EvalOptions& options) {
  options.apply_chat_template = model.chat_template != nullptr;
  if (!options.apply_chat_template) options.target_delimiter = "";
}

void check_metrics(const Task& task, const EvalOptions& options) {
  const std::vector<std::string> known = generated_metrics();
  for (const std::string& metric : options.metrics) {
    MOESAIC_CHECK(wanted(known, metric.c_str()), UsageError, "--metrics: got '{}', expected one of {}", metric,
                  fmt::join(known, ", "));
  }
  if (task.ranked()) {
    MOESAIC_CHECK(options.metrics.empty(), UsageError,
                  "--metrics: task {} ranks choices, and its metrics are acc and acc_norm. Add --generate to let the "
                  "model write, or leave the task out.",
                  task.name);
    return;
  }
  if (!wanted(metrics_of(task, options), kPassAt1)) return;
  MOESAIC_CHECK(task.code(), UsageError, "--metrics pass@1: task {} has no tests to run (HumanEval and MBPP have)",
                task.name);
  MOESAIC_CHECK(options.run_code, UsageError,
                "task {}: pass@1 runs programs that the model wrote on this machine, shut off from network, files and "
                "processes as far as the kernel can. If that is what you want, add --confirm_run_unsafe_code.",
                task.name);
}

generate::SamplingOptions sampling_of(const Task& task, const EvalOptions& options) {
  generate::SamplingOptions sampling = options.generation;
  if (sampling.max_new_tokens == 0) sampling.max_new_tokens = task.max_new_tokens;
  // With a chat template the end of the turn ends an answer, which may well hold a "def" or a "Question:".
  if (!options.apply_chat_template) sampling.stop.insert(sampling.stop.end(), task.stop.begin(), task.stop.end());
  return sampling;
}

std::pair<std::string, bool> prompt_text(const EvalModel& model, const Item& item, bool apply_chat_template) {
  if (apply_chat_template) {
    MOESAIC_CHECK(model.chat_template != nullptr, UsageError,
                  "--apply_chat_template: this model has no chat template. Evaluate it without.");
    return {model.chat_template->render(item.messages, true, item.tools), false};
  }
  MOESAIC_CHECK(item.messages.size() == 1 && item.tools.is_null(), UsageError,
                "a question is a conversation of {} messages{}, which only a chat template can render. Add "
                "--apply_chat_template.",
                item.messages.size(), item.tools.is_null() ? "" : " with tools");
  return {item.messages[0].value("content", ""), true};
}

std::vector<float> sentence_of(const EvalModel& model, const Item& item) {
  return model.model.needs().sentence == nn::Needs::Sentence::kColumn ? item.sentence : std::vector<float>();
}

TaskResult evaluate(const EvalModel& model, const Task& task, const EvalOptions& options,
                    const ProgressCallback& progress) {
  const auto start = std::chrono::steady_clock::now();
  check_metrics(task, options);
  TaskResult result;
  result.name = task.name;
  result.ranked = task.ranked();
  result.questions = static_cast<int64_t>(task.items.size());
  result.available = task.available;
  (result.ranked ? evaluate_ranked : evaluate_generated)(model, task, options, result, progress);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace moesaic::eval
