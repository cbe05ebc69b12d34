// moesaic study: a grid of runs, one after the other, and one report of them all.
#include "moesaic/run/study.h"

#include <spawn.h>
#include <sys/wait.h>

#include <csignal>
#include <thread>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "moesaic/run/compare.h"

namespace moesaic::cli {
namespace {

struct Options {
  std::string study;
  std::vector<std::string> overrides;
  bool dry_run = false;
};

/// `moesaic train` in a process of its own: what it takes of the memory is its own, and nothing that happens to it
/// happens to the study.
run::RunEnd train_apart(const std::vector<std::string>& arguments, const CatchSignals& signals) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setpgroup(&attributes, 0);  // what a terminal sends comes from here, once
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t process = 0;
  const int error = posix_spawn(&process, "/proc/self/exe", nullptr, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  MOESAIC_CHECK(error == 0, DataError, "study: no process for a run: {}", std::strerror(error));
  bool passed_on = false;
  int status = 0;
  while (waitpid(process, &status, WNOHANG) == 0) {
    if (signals.caught() && !passed_on) {
      kill(process, SIGTERM);
      passed_on = true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return run::RunEnd::kFinished;
  const bool stopped = WIFEXITED(status) && WEXITSTATUS(status) == static_cast<int>(ExitCode::kInterrupted);
  return stopped || passed_on ? run::RunEnd::kInterrupted : run::RunEnd::kFailed;
}

int run_verb(const Options& options, const CommonOptions& common, const CLI::App& app) {
  for (const char* flag : {"--seed", "--dtype"}) {
    MOESAIC_CHECK(app.count(flag) == 0, UsageError, "{}: expected `seeds` and `run.bf16` of the study file instead",
                  flag);
  }
  const run::Study study = run::read_study(options.study, options.overrides);
  size_t runs = 0;
  for (const run::StudyRow& row : study.rows) {
    runs += row.choices.size() + row.choices[0].runs.size() - 1;
    say("{}: {}{} seed{}\n", row.name,
        row.choices.size() > 1 ? fmt::format("{} choices by {}, then ", row.choices.size(), study.metric) : "",
        row.choices[0].runs.size(), row.choices[0].runs.size() > 1 ? "s" : "");
  }
  say("{} rows, {} runs, in {}\n", study.rows.size(), runs, study.output_dir.string());
  if (options.dry_run) return 0;
  std::filesystem::create_directories(study.output_dir);
  const FolderLock lock(study.output_dir);
  const std::filesystem::path table = study.output_dir / "study";
  run::check_comparison_files(table);

  const CatchSignals signals({SIGINT, SIGTERM, SIGHUP}, /*once=*/true);
  size_t number = 0;
  const run::StudyOutcome outcome = run::run_study(study, [&](const run::StudyRun& run) {
    say("\nrun {} of {}: {}\n", ++number, runs, run.name);
    std::fflush(stdout);
    return train_apart({"moesaic", "train", run.file().string(), "--resume", "auto", "--threads",
                        std::to_string(common.threads), "--device", common.device, "--log-level", common.log_level},
                       signals);
  });
  if (outcome.interrupted) {
    say_error("stopped; the same command goes on\n");
    return static_cast<int>(ExitCode::kInterrupted);
  }
  const std::filesystem::path results = study.output_dir / "results";
  std::filesystem::create_directories(results);
  for (size_t i = 0; i < outcome.runs.size(); ++i) {
    const std::string name = outcome.rows[i] + ", " + outcome.runs[i].filename().string();
    write_file_atomically(results / (run::folder_name(name) + ".json"),
                          run::peft_result(outcome.runs[i], name).dump(1) + "\n");
  }
  for (const OrderedJson& row : outcome.summary["rows"]) {
    if (row["sweep"].empty() || row["choice"].is_null()) continue;
    say("{}: {}{}\n", row["name"].get<std::string>(), row["choice"].get<std::string>(),
        row["at_edge"].get<bool>() ? ", at the edge of what was swept: a wider sweep may find better" : "");
  }
  if (!outcome.runs.empty()) {
    OrderedJson comparison = run::compare_runs(outcome.runs, study.means, outcome.rows);
    comparison["study"] = outcome.summary;
    run::write_comparison(table, comparison);
    say("\n{0}\nWritten: {1}.html, {1}.csv, {1}.json and {2}\n", run::comparison_table(comparison), table.string(),
        results.string());
  }
  const OrderedJson& failed = outcome.summary["failed"];
  for (const OrderedJson& name : failed) say_error("failed: {}\n", name.get<std::string>());
  return static_cast<int>(failed.empty() ? ExitCode::kOk : ExitCode::kData);
}

}  // namespace

Runner add_study(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  app.add_option("study", options->study, "Study file (YAML)")->required();
  app.add_option("overrides", options->overrides, "key=value: sets a key of the study file");
  app.add_flag("--dry-run", options->dry_run, "Check every run's keys and say how many there are, then stop");
  return [options, &app, &common] { return run_verb(*options, common, app); };
}

}  // namespace moesaic::cli
