// moesaic routes: which experts an adapter uses for which task, layer and token, or what the connections of a
// composition read; as JSON and one HTML page.
#include <iostream>

#include "cli/load.h"
#include "moesaic/base/progress.h"
#include "moesaic/compose/folder.h"
#include "moesaic/eval/composition_routes.h"
#include "moesaic/eval/routes.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> tasks;
  eval::TaskOptions task{.limit = 50};
  eval::EvalOptions eval;
  std::string text, output = "routes";
};

/// Expert use per task, averaged over sites and layers: enough for a terminal.
std::string table(const std::vector<eval::TaskRouting>& tasks) {
  size_t width = 4;
  for (const eval::TaskRouting& task : tasks) width = std::max(width, task.name.size());
  std::string text = fmt::format("{:<{}}  {:>8}  {:>8}  {:>9}  mean probability of each expert\n", "task", width,
                                 "tokens", "entropy", "max share");
  for (const eval::TaskRouting& task : tasks) {
    std::vector<double> mean;
    double entropy = 0, largest = 0;
    for (const auto& [name, site] : task.stats.sites()) {
      if (mean.empty()) mean.assign(site.experts(), 0);
      entropy += site.entropy() / std::log(static_cast<double>(site.experts()));
      largest = std::max(largest, static_cast<double>(*std::max_element(site.top1.begin(), site.top1.end())) /
                                      static_cast<double>(site.rows));
      for (int64_t e = 0; e < std::min<int64_t>(site.experts(), mean.size()); ++e) mean[e] += site.mean_prob(e);
    }
    const double sites = static_cast<double>(task.stats.sites().size());
    for (double& value : mean) value /= sites;
    text += fmt::format("{:<{}}  {:>8}  {:>8.3f}  {:>9.3f}  {:.3f}\n", task.name, width, task.tokens, entropy / sites,
                        largest, fmt::join(mean, " "));
  }
  return text;
}

/// What each connection does per task; enough for a terminal.
std::string table(const compose::Composition& composition, const std::vector<eval::TaskReading>& tasks) {
  size_t width = 4;
  for (const eval::TaskReading& task : tasks) width = std::max(width, task.name.size());
  std::string text = fmt::format("{:<{}}  {:<20}  {:>9}  {:>8}  {:>11}\n", "task", width, "connection", "|Y| / |H|",
                                 "entropy", "first share");
  for (const eval::TaskReading& task : tasks) {
    size_t k = 0;
    for (size_t m = 0; m < composition.augmenting().size(); ++m) {
      for (const compose::ConnectionPair& pair : composition.config().augmenting[m].connections) {
        const eval::ConnectionUse& use = task.connections.at(k++);
        auto mean = [](double sum, int64_t count) { return count > 0 ? sum / static_cast<double>(count) : 0.0; };
        text += fmt::format("{:<{}}  {:<20}  {:>9.3f}  {:>8.3f}  {:>11.3f}\n", task.name, width,
                            fmt::format("{}: {} -> {}", m, pair.aug, pair.anchor), mean(use.added, use.rows),
                            mean(use.spread, use.choosers), mean(use.first, use.readers));
      }
    }
  }
  return text;
}

/// --text as the model reads a user's message.
std::optional<std::vector<int64_t>> text_ids(const Options& options, const eval::EvalModel& model) {
  if (options.text.empty()) return std::nullopt;
  eval::Item item;
  item.messages = OrderedJson::array();
  item.messages.push_back({{"role", "user"}, {"content", options.text}});
  const auto [prompt, special] = eval::prompt_text(model, item, options.eval.apply_chat_template);
  return model.tokenizer.encode(prompt, special);
}

void write(const Options& options, const OrderedJson& json, const std::string& page, const std::string& printed) {
  const std::filesystem::path base = options.output;
  if (base.has_parent_path()) std::filesystem::create_directories(base.parent_path());
  write_file_atomically(base.string() + ".json",
                        json.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  write_file_atomically(base.string() + ".html", page);
  std::cout << printed << fmt::format("Written: {0}.json and {0}.html\n", base.string());
}

/// `read` of every task, with a progress bar.
template <class Read>
auto of_all(const std::vector<eval::Task>& tasks, Read read) {
  std::vector<decltype(read(tasks[0], eval::ProgressCallback()))> results;
  for (const eval::Task& task : tasks) {
    Progress progress(task.name, static_cast<int64_t>(task.items.size()));
    results.push_back(read(task, [&](int64_t done) { progress.update(done); }));
  }
  return results;
}

int run_composition(const Options& options, const LoadedModel& loaded, const std::vector<eval::Task>& tasks) {
  const eval::EvalModel model = loaded.for_evaluation();
  const auto readings = of_all(tasks, [&](const eval::Task& task, const eval::ProgressCallback& progress) {
    return eval::read_task(model, task, options.eval, progress);
  });
  std::optional<eval::TextReading> text;
  if (const auto ids = text_ids(options, model)) text = eval::read_text(model, *ids);
  const OrderedJson json = eval::composition_routes_json(options.model.model, *loaded.composition, loaded.adapter_names,
                                                         readings, text ? &*text : nullptr);
  write(options, json, eval::composition_routes_html(json),
        readings.empty() ? "" : table(*loaded.composition, readings) + "\n");
  return 0;
}

int run(const Options& options, const CommonOptions& common) {
  const bool composition = compose::is_composition(options.model.model);
  MOESAIC_CHECK(composition || !options.model.adapters.empty(), UsageError,
                "routes: --adapter is missing; a base model has no routers");
  MOESAIC_CHECK(!options.tasks.empty() || (composition && !options.text.empty()), UsageError,
                "routes: --tasks is missing{}", composition ? "; give tasks, a --text, or both" : "");
  std::vector<eval::Task> tasks;
  if (!options.tasks.empty()) tasks = eval::load_tasks(options.tasks, options.task);
  const LoadedModel loaded = load_model(options.model, common, {.composition = true});
  if (composition) return run_composition(options, loaded, tasks);
  const eval::EvalModel model = loaded.for_evaluation();
  MOESAIC_CHECK(model.routed, UsageError,
                "routes: the adapter has one expert per site and so no router. Give a mov or molora.");
  const auto routings = of_all(tasks, [&](const eval::Task& task, const eval::ProgressCallback& progress) {
    return eval::route_task(model, task, options.eval, progress);
  });
  std::optional<eval::TextRouting> text;
  if (const auto ids = text_ids(options, model)) text = eval::route_text(model, *ids);
  const OrderedJson json =
      eval::routes_json(options.model.model, loaded.adapter_names, routings, text ? &*text : nullptr);
  write(options, json, eval::routes_html(json), table(routings) + "\n");
  return 0;
}

}  // namespace

Runner add_routes(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_task_options(app, options->tasks, options->task, options->eval);
  app.get_option("--tasks")->required(false);  // a composition can do with a text
  app.add_option("--text", options->text, "A text to show token by token");
  app.add_option("-o,--output", options->output, "Where to write: PATH.json and PATH.html")->capture_default_str();
  return [options, &common] { return run(*options, common); };
}

}  // namespace moesaic::cli
