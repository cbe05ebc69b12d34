// moesaic train: a run file becomes an adapter, the connections of a composition, or a model.

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/ranks.h"
#include "moesaic/base/progress.h"
#include "moesaic/run/run.h"
#include "moesaic/train/checkpoint.h"

namespace moesaic::cli {
namespace {

struct TrainOptions {
  std::string run;                     // run.yaml
  std::vector<std::string> overrides;  // key=value
  std::string resume;                  // auto | none | DIR; "" = the run's own key
  bool dry_run = false, keys = false;
  std::string accelerator;  // --for
  int64_t ranks = 0, restarts = 0;
};

/// `text` as one word of a shell's command.
std::string shell_word(const std::string& text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || c >= 0x80 || std::strchr("_-+=.,:/@%", c) != nullptr;
  });
  if (plain) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? "'\\''" : std::string(1, c);
  return word + "'";
}

/// The run as a command, to be pasted into a shell.
std::string command(const TrainOptions& options, const CLI::App& app) {
  std::string command = "moesaic train " + shell_word(options.run);
  if (options.ranks > 1) command += fmt::format(" --ranks {}", options.ranks);
  for (const std::string& word : options.overrides) command += " " + shell_word(word);
  for (const char* flag : {"--seed", "--device", "--dtype"}) {
    if (app.count(flag) > 0) command += fmt::format(" {} {}", flag, shell_word(app.get_option(flag)->results().back()));
  }
  return command;
}

int train_run(const TrainOptions& options, const CLI::App& app, run::Run& run, bool first) {
  std::unique_ptr<Progress> progress;
  const CatchSignals signals({SIGINT, SIGTERM, SIGHUP, SIGUSR1}, /*once=*/true);
  train::TrainHooks hooks;
  hooks.stop = [&] { return signals.caught(); };
  hooks.on_log = [&](const train::StepLog& log) {
    if (!progress) progress = std::make_unique<Progress>("train", log.max_steps, log.step - 1);
    progress->update(log.step, fmt::format("loss {:.4f}, {} tokens/s", log.loss, format_count(log.tokens_per_second)));
  };
  const train::TrainResult result = run.train(hooks, command(options, app));
  if (progress) progress->finish();
  if (result.interrupted) {
    if (first) {
      say_error("stopped after step {}; go on with:\n  {}\n", result.steps, command(options, app) + " --resume auto");
    }
    return static_cast<int>(ExitCode::kInterrupted);
  }
  const auto& best = result.best;
  say("done       step {}, train loss {:.4f}{}, {} in {}\n", result.steps, result.train_loss,
      best ? fmt::format(", best {} {:.4f} at step {}", best->metric, best->value, best->step) : "",
      run.config().train.output_dir.string(), format_duration(result.seconds));
  if (const std::string why = result.stopping_reason(); !why.empty()) say("           {}\n", why);
  say("           report: {}\n", (run.config().train.output_dir / "report.html").string());
  for (const auto& count : run.counts()) {
    say("           {}: {} examples drawn, {} skipped, {} targets\n", count.name, count.drawn, count.skipped,
        count.targets);
  }
  return 0;
}

int run_rank(const TrainOptions& options, const CommonOptions& common, const CLI::App& app, const ranks::Place& place) {
  MOESAIC_CHECK(options.accelerator.empty() || options.dry_run, UsageError,
                "--for {}: got no --dry-run, expected it: nothing is trained on a processor that is only planned for",
                options.accelerator);
  const train::Accelerator* planned = options.accelerator.empty() ? nullptr : &train::accelerator(options.accelerator);
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);  // for the key `deterministic`, on CUDA
  OrderedJson config = run::read_run(options.run, options.overrides);
  // The common flags win over the run file where they were given.
  if (app.count("--seed") > 0) config["seed"] = common.seed;
  if (app.count("--device") > 0) config["device"] = common.device;
  if (app.count("--dtype") > 0) {
    config["bf16"] = common.dtype == "auto"
                         ? OrderedJson()
                         : OrderedJson(number_format(common.dtype, torch::kCPU).dtype == torch::kBFloat16);
  }
  if (!options.resume.empty()) config["resume_from_checkpoint"] = options.resume;
  if (planned != nullptr && config.value("bf16", OrderedJson()).is_null()) config["bf16"] = true;
  run::RunConfig parsed = run::parse_run_config(config, options.run);
  const std::string& resume = parsed.train.resume_from_checkpoint;
  const bool new_run =
      resume == "none" || (resume == "auto" && !train::newest_checkpoint(parsed.train.output_dir).has_value());
  if (options.dry_run && options.ranks > 0 && new_run && parsed.train.micro_batches_per_step == 0) {
    parsed.train.micro_batches_per_step = options.ranks * parsed.train.gradient_accumulation_steps;
  }
  parsed.device = device_of(place, parsed.device);
  const auto group = std::make_shared<ranks::Group>(options.dry_run ? ranks::Place{} : place,
                                                    std::chrono::seconds(parsed.train.ddp_timeout));
  // Started again, it goes on where it was, once it had begun.
  if (place.restart > 0 && group->begun()) {
    if (parsed.train.resume_from_checkpoint == "none") parsed.train.resume_from_checkpoint = "auto";
    parsed.train.overwrite_output_dir = false;
  }
  run::Run run(std::move(parsed), options.dry_run, group);
  if (options.dry_run) run.check_start();
  say(run.plan().text());
  std::fflush(stdout);
  if (!options.dry_run) return train_run(options, app, run, group->first());
  run.check_rows();
  say(run.needs_plan(planned).text());
  return 0;
}

int run_train(const TrainOptions& options, const CommonOptions& common, const CLI::App& app) {
  if (options.keys) {
    say(run::run_keys_markdown());
    return 0;
  }
  MOESAIC_CHECK(!options.run.empty(), UsageError, "train: the run file is missing");
  const ranks::Place place = own_place(options.ranks);
  MOESAIC_CHECK(options.restarts == 0 || options.ranks > 1, UsageError,
                "--restarts {}: got no --ranks above 1, expected ranks that can be started again", options.restarts);
  if (options.ranks > 1 && place.size == 1 && !options.dry_run) return launch(options.ranks, options.restarts);
  settle_down(place, common.threads);
  return told_once(place, [&] { return run_rank(options, common, app, place); });
}

}  // namespace

Runner add_train(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<TrainOptions>();
  app.add_option("run", options->run, "Run file (YAML)");
  app.add_option("overrides", options->overrides, "key=value: sets a key of the run file");
  app.add_option("--resume", options->resume, "auto, none or a checkpoint folder; replaces resume_from_checkpoint");
  app.add_flag("--dry-run", options->dry_run, "Say what would be trained and the memory it needs, then stop");
  app.add_option("--for", options->accelerator,
                 "With --dry-run: the memory and time on this GPU (h100, a100, rtx4090, ...), by its data sheet");
  add_ranks_option(app, options->ranks, "Processes of this machine that train it together");
  app.add_option("--restarts", options->restarts,
                 "With --ranks: how often all are started again, from the newest checkpoint, when one fails")
      ->check(CLI::Range(0, 1000));
  app.add_flag("--keys", options->keys, "Print every key of a run file with its default, as Markdown tables");
  return [options, &app, &common] { return run_train(*options, common, app); };
}

}  // namespace moesaic::cli
