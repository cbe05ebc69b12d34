// moesaic routes: which experts are used for which task, layer and token, and what the connections of a composition
// read; as JSON, one HTML page and a table.
#include "moesaic/eval/routes.h"

#include "cli/options.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> tasks;
  eval::TaskOptions task{.limit = 50};
  eval::EvalOptions eval;
  run::AskOptions ask;
  std::string text, output = "routes";
};

/// An earlier report may be replaced, and nothing else.
void check_report(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return;
  MOESAIC_CHECK(eval::is_routes_report(read_file(path)), UsageError,
                "--output {}: got a file that `routes` did not write, expected none: nothing is overwritten",
                path.string());
}

int run_routes(Options options, const CommonOptions& common) {
  MOESAIC_CHECK(!options.tasks.empty() || !options.text.empty(), UsageError,
                "routes: --tasks is missing; give tasks, a --text, or both");
  const std::filesystem::path base = options.output;
  for (const char* ending : {".json", ".html", ".csv"}) check_report(base.string() + ending);
  std::vector<eval::Task> tasks;
  if (!options.tasks.empty()) tasks = eval::load_tasks(options.tasks, options.task);
  const Loaded loaded = load(options.model, common);
  spdlog::info("computing in {}", loaded.computes_in());
  const OrderedJson json = run::routes(loaded.examinee(), tasks, options.text, options.ask, options.eval, task_bars());

  if (base.has_parent_path()) std::filesystem::create_directories(base.parent_path());
  write_file_atomically(base.string() + ".json",
                        json.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  write_file_atomically(base.string() + ".html", eval::routes_html(json));
  write_file_atomically(base.string() + ".csv", eval::routes_csv(json));
  if (!tasks.empty()) say("{}\n", eval::routes_table(json));
  say("Written: {0}.json, {0}.html and {0}.csv\n", base.string());
  return 0;
}

}  // namespace

Runner add_routes(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  common.dtype = "float32";  // a figure does not depend on the machine
  add_model_options(app, options->model);
  add_task_options(app, options->tasks, options->task, options->ask);
  app.get_option("--tasks")->required(false);  // a text is enough
  app.add_option("--text", options->text, "A text to show token by token");
  app.add_option("-o,--output", options->output, "Where to write: PATH.json, PATH.html and PATH.csv")
      ->capture_default_str();
  return [options, &common] { return run_routes(*options, common); };
}

}  // namespace moesaic::cli
