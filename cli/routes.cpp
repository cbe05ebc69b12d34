// moesaic routes: which experts an adapter uses for which task, layer and token; as JSON and one HTML page.
#include <iostream>

#include "cli/load.h"
#include "moesaic/base/progress.h"
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

int run(const Options& options, const CommonOptions& common) {
  MOESAIC_CHECK(!options.model.adapters.empty(), UsageError,
                "routes: --adapter is missing; a base model has no routers");
  const std::vector<eval::Task> tasks = eval::load_tasks(options.tasks, options.task);
  const LoadedModel loaded = load_model(options.model, common);
  const eval::EvalModel model = loaded.for_evaluation();
  MOESAIC_CHECK(model.routed, UsageError,
                "routes: the adapter has one expert per site and so no router. Give a mov or molora.");
  std::vector<eval::TaskRouting> routings;
  for (const eval::Task& task : tasks) {
    Progress progress(task.name, static_cast<int64_t>(task.items.size()));
    routings.push_back(eval::route_task(model, task, options.eval, [&](int64_t done) { progress.update(done); }));
  }
  std::optional<eval::TextRouting> text;
  if (!options.text.empty()) {
    eval::Item item;
    item.messages = OrderedJson::array();
    item.messages.push_back({{"role", "user"}, {"content", options.text}});
    const auto [prompt, special] = eval::prompt_text(model, item, options.eval.apply_chat_template);
    text = eval::route_text(model, loaded.tokenizer->encode(prompt, special));
  }
  const OrderedJson json =
      eval::routes_json(options.model.model, loaded.adapter_names, routings, text ? &*text : nullptr);
  const std::filesystem::path base = options.output;
  if (base.has_parent_path()) std::filesystem::create_directories(base.parent_path());
  write_file_atomically(base.string() + ".json",
                        json.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  write_file_atomically(base.string() + ".html", eval::routes_html(json));
  std::cout << table(routings) << fmt::format("\nWritten: {0}.json and {0}.html\n", base.string());
  return 0;
}

}  // namespace

Runner add_routes(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  add_task_options(app, options->tasks, options->task, options->eval);
  app.add_option("--text", options->text, "A text to show token by token");
  app.add_option("-o,--output", options->output, "Where to write: PATH.json and PATH.html")->capture_default_str();
  return [options, &common] { return run(*options, common); };
}

}  // namespace moesaic::cli
