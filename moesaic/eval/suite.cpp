#include "moesaic/eval/suite.h"

#include <algorithm>

#include "moesaic/eval/page.h"
#include "moesaic/eval/pages.h"

namespace moesaic::eval {
namespace {

/// A task's score on each of its templates, in the order in which they come.
OrderedJson scores_of(const Task& task, const TaskResult& result, const std::string& metric) {
  OrderedJson scores = OrderedJson::array();
  auto add = [&](const std::string& prompt, int64_t questions, double value) {
    scores.push_back({{"task", task.name}, {"template", prompt}, {"questions", questions}, {"value", value}});
  };
  if (result.variants.empty()) {
    const auto corpus = result.corpus_metrics.find(metric);
    add("", result.questions,
        corpus != result.corpus_metrics.end() ? corpus->second.value : result.metrics.at(metric).value);
    return scores;
  }
  std::vector<std::pair<std::string, int64_t>> counts;
  for (const Item& item : task.items) {
    const auto known =
        std::find_if(counts.begin(), counts.end(), [&](const auto& count) { return count.first == item.variant; });
    if (known != counts.end()) {
      ++known->second;
    } else {
      counts.emplace_back(item.variant, 1);
    }
  }
  for (const auto& [prompt, count] : counts) add(prompt, count, result.variants.at(prompt).at(metric).value);
  return scores;
}

}  // namespace

OrderedJson suite_json(const Suite& suite, const std::vector<TaskResult>& results, const EvalOptions& options) {
  OrderedJson json = {{"suite", suite.name}, {"metric", ""}, {"columns", OrderedJson::array()}};
  std::vector<double> medians;
  size_t next = 0;
  for (const Suite::Column& column : suite.columns) {
    OrderedJson tasks = OrderedJson::array(), scores = OrderedJson::array();
    std::vector<double> values;
    for (size_t end = next + column.tasks; next < end; ++next) {
      const Task& task = suite.tasks[next];
      const std::string metric = metric_names(task, options).at(0);
      json["metric"] = metric;
      tasks.push_back(task.name);
      for (const OrderedJson& score : scores_of(task, results.at(next), metric)) {
        values.push_back(score["value"].get<double>());
        scores.push_back(score);
      }
    }
    medians.push_back(median_of(values));
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    json["columns"].push_back({{"name", column.name},
                               {"tasks", tasks},
                               {"scores", scores},
                               {"median", medians.back()},
                               {"mean", mean_of(values).value},
                               {"min", *least},
                               {"max", *most}});
  }
  json["mean"] = mean_of(medians).value;
  return json;
}

std::string suite_table(const OrderedJson& suite) {
  const OrderedJson& columns = suite["columns"];
  auto percent = [](const OrderedJson& value) { return fmt::format("{:.2f}", 100 * value.get<double>()); };
  std::string table =
      fmt::format("{}: {} in percent\n", suite["suite"].get<std::string>(), suite["metric"].get<std::string>());
  for (const OrderedJson& column : columns) {
    table += fmt::format("\n{}\n", column["name"].get<std::string>());
    for (const OrderedJson& score : column["scores"]) {
      std::string name = score["template"].get<std::string>();
      if (column["tasks"].size() > 1 || name.empty()) {
        name = score["task"].get<std::string>() + (name.empty() ? "" : ": ") + name;
      }
      table += fmt::format("  {:>6}  {:>6}  {}\n", percent(score["value"]), score["questions"].get<int64_t>(), name);
    }
    table += fmt::format("  median {}, mean {}, min {}, max {}\n", percent(column["median"]), percent(column["mean"]),
                         percent(column["min"]), percent(column["max"]));
  }
  std::string names = "\n|", rule = "|", values = "|";
  auto cell = [&](const std::string& name, const std::string& value) {
    const size_t width = std::max(name.size(), size_t{6});
    names += fmt::format(" {:>{}} |", name, width);
    rule += fmt::format("{:->{}}:|", "", width + 1);
    values += fmt::format(" {:>{}} |", value, width);
  };
  for (const OrderedJson& column : columns) cell(column["name"].get<std::string>(), percent(column["median"]));
  cell("mean", percent(suite["mean"]));
  return table + names + "\n" + rule + "\n" + values + "\n";
}

std::string suite_html(const OrderedJson& suite) { return page_of(kSuiteHtml, {}, {kSuiteJs}, suite); }

}  // namespace moesaic::eval
