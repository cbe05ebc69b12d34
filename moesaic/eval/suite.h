// A suite's scores: a column per data set, the median over its prompt templates, and the mean of the columns.
#pragma once
#include "moesaic/eval/evaluate.h"

namespace moesaic::eval {

/// {"suite", "metric", "columns": [{"name", "tasks", "scores": [{"task", "template", "questions", "value"}], "median",
/// "mean", "min", "max"}], "mean"}. `results` are those of suite.tasks, in their order. A score is that of a task's
/// first metric on the rows of one template, or on all rows of a task without templates.
OrderedJson suite_json(const Suite& suite, const std::vector<TaskResult>& results, const EvalOptions& options);

/// The same for people: in percent, template by template, set by set, and the row of columns.
std::string suite_table(const OrderedJson& suite);

/// The same as one page.
std::string suite_html(const OrderedJson& suite);

}  // namespace moesaic::eval
