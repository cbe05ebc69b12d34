// moesaic eval: tasks from files through a model and its adapters; scores as a table and as JSON.

#include "cli/options.h"
#include "cli/ranks.h"
#include "moesaic/eval/report.h"
#include "moesaic/eval/suite.h"
#include "moesaic/eval/task_file.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  std::vector<std::string> tasks;
  eval::TaskOptions task;
  eval::EvalOptions eval;
  run::AskOptions ask;
  std::string suite, batch_size = "auto", output_path;
  bool log_samples = false, json = false;
  int64_t ranks = 0;
};

int run_rank(Options options, CommonOptions common, const ranks::Place& place) {
  common.device = device_of(place, common.device);
  if (options.batch_size != "auto") {
    size_t used = 0;
    try {
      options.eval.batch_size = std::stoll(options.batch_size, &used);
    } catch (const std::exception&) {
    }
    constexpr int64_t kMost = 4096;
    MOESAIC_CHECK(used == options.batch_size.size() && options.eval.batch_size > 0 && options.eval.batch_size <= kMost,
                  UsageError, "--batch_size: got '{}', expected a number from 1 to {} or auto", options.batch_size,
                  kMost);
  }
  MOESAIC_CHECK(!options.log_samples || !options.output_path.empty(), UsageError,
                "--log_samples needs --output_path: that is where the samples go");
  MOESAIC_CHECK(options.tasks.empty() != options.suite.empty(), UsageError, "expected either --tasks or --suite");
  eval::Suite suite;
  if (options.suite.empty()) {
    suite.tasks = eval::load_tasks(options.tasks, options.task);
  } else {
    suite = eval::load_suite(options.suite, options.task);
  }
  const std::vector<eval::Task>& tasks = suite.tasks;
  for (const eval::Task& task : tasks) eval::check_metrics(task, options.eval);
  options.eval.group = std::make_shared<ranks::Group>(place, std::chrono::hours(24 * 7));
  const Loaded loaded = load(options.model, common);
  spdlog::info("computing in {}", loaded.computes_in());
  options.eval.keep_samples = options.log_samples;
  const auto [results, info, json] =
      run::evaluate(loaded.examinee(), suite, options.ask, options.eval, options.task.limit, common.seed, task_bars());
  if (options.json) {
    say("{}\n", json.dump(2, ' ', false, OrderedJson::error_handler_t::replace));
  } else {
    say(suite.columns.empty() ? eval::results_table(results) : eval::suite_table(json["suite"]));
  }
  if (!options.output_path.empty() && place.rank == 0) {
    const auto path = eval::write_results(options.output_path, json, results, info, options.log_samples);
    spdlog::info("results written to {}", path.string());
  }
  return 0;
}

int run_verb(const Options& options, const CommonOptions& common) {
  const ranks::Place place = own_place(options.ranks);
  if (options.ranks > 1 && place.size == 1) return launch(options.ranks, /*restarts=*/0);
  settle_down(place, common.threads);
  return told_once(place, [&] { return run_rank(options, common, place); });
}

}  // namespace

Runner add_eval(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  options->eval.generation.max_new_tokens = 0;  // the task's own
  common.dtype = "float32";                     // an accuracy does not depend on the machine
  add_model_options(app, options->model);
  add_task_options(app, options->tasks, options->task, options->ask);
  app.get_option("--tasks")->required(false);  // or a suite
  app.add_option("--suite", options->suite,
                 "Tasks that make one row of scores: t0, or the file (.yaml) of a group of tasks");
  app.add_option("--batch_size", options->batch_size, "Questions side by side, or auto")->capture_default_str();
  app.add_option("--num_fewshot", options->task.num_fewshot,
                 "Solved examples in the prompt; default: as many as the task file says, else 0")
      ->check(CLI::Range(0, 100));
  app.add_flag("--generate", options->task.generate, "Let the model write even where the answers are a closed set");
  app.add_flag("--score_eos", options->eval.score_eos, "Score the EOS token behind each choice too, as T0 does");
  app.add_option(
         "--max_gen_toks", options->eval.generation.max_new_tokens,
         "Tokens of a generated answer at most; 0 = the task's own: 128, arithmetic and MBPP 256, HumanEval 1024")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  repeated(
      app.add_option("--until", options->eval.generation.stop, "Text that ends a generated answer; may be repeated"));
  repeated(app.add_option(
               "--metrics", options->eval.metrics,
               "Metrics of generated answers, comma-separated: exact_match, f1, rougeL, number, flexible-extract, "
               "remove_whitespace, pass@1, bleu, chrf, chrf1, codexglue_bleu; default: the task's own"))
      ->delimiter(',');
  app.add_flag("--confirm_run_unsafe_code", options->eval.run_code,
               "Agree that pass@1 runs programs the model wrote, shut off from network, files and processes");
  app.add_option("--output_path", options->output_path, "Folder for results_*.json and, of routers, routing_*.json");
  app.add_flag("--log_samples", options->log_samples, "Write every question and answer beside the results");
  add_ranks_option(app, options->ranks, "Processes of this machine that divide the questions");
  app.add_flag("--json", options->json, "Print the results as JSON instead of a table");
  return [options, &common] { return run_verb(*options, common); };
}

}  // namespace moesaic::cli
