// Tasks and texts through an opened model: what `moesaic eval` and `moesaic routes` tell of it.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/eval/evaluate.h"
#include "moesaic/eval/report.h"
#include "moesaic/run/open.h"

namespace moesaic::run {

/// How questions are put, where the user says so.
struct AskOptions {
  std::optional<bool> apply_chat_template;
  std::optional<std::string> target_delimiter;
};

/// A model under examination, and what it was opened of.
struct Examinee {
  const Opened& opened;
  const ModelReference& from;

  /// As eval/ wants it.
  eval::EvalModel model() const { return {*opened.model, *opened.tokenizer, opened.chat_template.get()}; }
  /// "runs/mo", "runs/a+runs/b:0.5"; the model's where there is no adapter.
  std::string name() const;
};

/// Called with a task and the number of its questions that are done.
using TaskProgress = std::function<void(const eval::Task& task, int64_t done)>;

struct Evaluated {
  std::vector<eval::TaskResult> results;
  eval::RunInfo info;
  OrderedJson json;  // eval::results_json, with "suite" and "groups" where the tasks are a suite's
};
/// Scores the suite's tasks; those without columns stand alone. Questions are put as the user says, else as an adapter
/// was trained, else as `options` stand; answers end at the model's own ids. Throws what eval::evaluate throws.
Evaluated evaluate(const Examinee& subject, const eval::Suite& suite, const AskOptions& ask, eval::EvalOptions options,
                   int64_t limit, uint64_t seed, const TaskProgress& progress = nullptr);

/// eval::routes_json of the tasks and of `text` ("" = none), which stands for a user's message. Throws UsageError
/// where nothing routes.
OrderedJson routes(const Examinee& subject, const std::vector<eval::Task>& tasks, const std::string& text,
                   const AskOptions& ask, eval::EvalOptions options, const TaskProgress& progress = nullptr);

}  // namespace moesaic::run
