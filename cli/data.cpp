// moesaic data: look at training data before a run does.
#include "cli/command.h"
#include "demos/key_files.h"
#include "demos/skills.h"
#include "moesaic/data/superni.h"
#include "moesaic/data/validate.h"
#include "moesaic/models/registry.h"
#include "moesaic/run/run.h"

namespace moesaic::cli {
namespace {

struct DataOptions {
  std::string run;  // preview
  std::vector<std::string> overrides;
  int64_t examples = 1;
  std::string file, formatting = "auto", model;  // validate
  std::string folder;                            // skills, keys
  int64_t train_rows = demos::kTrainRows, test_rows = demos::kTestRows, key_test_rows = 200;
  std::string tasks;  // superni
  data::SuperniOptions superni;
};

/// One line per token: its place, its id, `*` where it is a target, and its text.
void print_example(const data::Example& example, const tokenizer::Tokenizer& tokenizer, const std::string& dataset) {
  say("{}: {} tokens, {} targets\n{}\n", dataset, example.ids.size(), example.targets(),
      tokenizer.decode(example.ids, false));
  say("{:>6} {:>8} {:>6}  text\n", "place", "id", "target");
  for (size_t i = 0; i < example.ids.size(); ++i) {
    const bool target = i > 0 && example.mask[i];
    // JSON's escapes show line breaks, and bytes that are half a character as a replacement character.
    const std::string text =
        Json(tokenizer.decode({example.ids[i]}, false)).dump(-1, ' ', false, Json::error_handler_t::replace);
    say("{:>6} {:>8} {:>6}  {}\n", i, example.ids[i], target ? "*" : "", text);
  }
  say("\n");
}

int preview(const DataOptions& options, const CommonOptions& common, const CLI::App& app) {
  OrderedJson config = run::read_run(options.run, options.overrides);
  if (app.count("--seed") > 0) config["seed"] = common.seed;  // as train does
  run::Run run(run::parse_run_config(config, options.run), /*dry=*/true);
  for (const data::MixtureCount& count : run.counts()) {
    say("{}: {} rows, {:.2f} % of the draws\n", count.name, count.rows, 100 * count.rate);
  }
  say("\n");
  const std::vector<data::MixtureCount> counts = run.counts();
  for (size_t dataset = 0; dataset < counts.size(); ++dataset) {
    for (int64_t i = 0; i < options.examples; ++i) {
      print_example(run.next_example(dataset), run.renderer().tokenizer(), counts[dataset].name);
    }
  }
  return 0;
}

/// The data sets of a run file as it renders them, or one file, rendered when a model is named.
std::vector<data::Validation> judge(const DataOptions& options) {
  constexpr size_t kProblems = 20;
  if (options.file.ends_with(".yaml") || options.file.ends_with(".yml")) {
    return run::Run(run::parse_run_config(run::read_run(options.file), options.file), /*dry=*/true)
        .judge_rows(kProblems);
  }
  data::DatasetConfig config;
  config.name = options.file;
  config.path = options.file;
  config.formatting = options.formatting;
  std::shared_ptr<const data::Renderer> renderer;
  if (!options.model.empty()) renderer = data::Renderer::open(*models::open_checkpoint(options.model), {});
  return {data::validate(config, {.max_problems = kProblems, .renderer = renderer.get(), .progress = {}})};
}

int validate(const DataOptions& options) {
  bool damaged = false;
  for (const data::Validation& result : judge(options)) {
    say("{}: {} rows, formatting {}, {} damaged, {} without an answer\n", result.name, result.rows, result.formatting,
        result.damaged, result.unanswered);
    for (const std::string& problem : result.problems) say("  {}\n", visible_in_line(problem));
    if (result.damaged > static_cast<int64_t>(result.problems.size())) say("  ...\n");
    damaged |= result.damaged > 0;
  }
  return static_cast<int>(damaged ? ExitCode::kData : ExitCode::kOk);
}

void split_superni(const DataOptions& options, const CommonOptions& common) {
  data::SuperniOptions wanted = options.superni;
  wanted.seed = common.seed;
  const std::vector<data::SuperniCategory> categories = data::split_superni(options.tasks, options.folder, wanted);
  say("{:<34} {:>6} {:>10} {:>10}\n", "category", "tasks", "train rows", "test rows");
  for (const data::SuperniCategory& category : categories) {
    say("{:<34} {:>6} {:>10} {:>10}{}\n", category.name, category.tasks, category.rows, category.test_rows,
        category.held_out ? "  held out" : "");
  }
}

}  // namespace

Runner add_data(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<DataOptions>();
  app.require_subcommand(1);
  CLI::App* preview_app =
      app.add_subcommand("preview", "The first examples of every data set of a run: text, token ids and targets");
  preview_app->add_option("run", options->run, "Run file (YAML)")->required();
  preview_app->add_option("overrides", options->overrides, "key=value: sets a key of the run file");
  preview_app->add_option("-n", options->examples, "Examples of each data set")->capture_default_str();
  CLI::App* validate_app = app.add_subcommand("validate", "Read every row of a file and list the damaged ones");
  validate_app->add_option("file", options->file, "Data file, folder of data files, or run file (YAML)")->required();
  validate_app->add_option("--model", options->model, "Render the rows with this model's chat template and tokenizer");
  validate_app->add_option("--formatting", options->formatting, "Shape of the rows")->capture_default_str();
  CLI::App* skills_app = app.add_subcommand("skills", "Write the demo's skills as data sets into a folder");
  skills_app->add_option("folder", options->folder, "Folder; created")->required();
  skills_app->add_option("--train_rows", options->train_rows, "Rows of each trained skill")->capture_default_str();
  skills_app->add_option("--test_rows", options->test_rows, "Test rows of each skill")->capture_default_str();
  CLI::App* keys_app = app.add_subcommand("keys", "Write key-value arithmetic as data sets and tasks into a folder");
  keys_app->add_option("folder", options->folder, "Folder; created")->required();
  keys_app->add_option("--test_rows", options->key_test_rows, "Questions of each task")->capture_default_str();
  CLI::App* superni_app = app.add_subcommand(
      "superni", "Split Super-NaturalInstructions by category: tasks to train on, instances and tasks held out");
  superni_app->add_option("tasks", options->tasks, "Folder of the task files")->required();
  superni_app->add_option("folder", options->folder, "Folder to write; created")->required();
  superni_app->add_option("--held_out", options->superni.held_out, "Categories that are not trained on")
      ->delimiter(',')
      ->capture_default_str();
  superni_app->add_option("--test_rows", options->superni.test_rows, "Instances of each trained task that are held out")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  superni_app
      ->add_option("--held_out_rows", options->superni.held_out_rows,
                   "Instances of each task of these categories; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  superni_app
      ->add_option("--max_chars", options->superni.max_chars,
                   "Leave longer instances out, the definition counted; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  // The common flags may follow the sub-command.
  for (CLI::App* verb : {preview_app, validate_app, skills_app, keys_app, superni_app}) verb->fallthrough();
  return [options, preview_app, validate_app, keys_app, superni_app, &common, &app] {
    if (preview_app->parsed()) return preview(*options, common, app);
    if (validate_app->parsed()) return validate(*options);
    if (superni_app->parsed()) {
      split_superni(*options, common);
    } else if (keys_app->parsed()) {
      demos::write_key_files(options->folder, options->key_test_rows, common.seed);
    } else {
      demos::write_skills(options->folder, options->train_rows, options->test_rows, common.seed);
    }
    say("Written: {}\n", options->folder);
    return 0;
  };
}

}  // namespace moesaic::cli
