// moesaic compare: runs side by side, as a table, a page, CSV and JSON.
#include "moesaic/run/compare.h"

#include "cli/command.h"

namespace moesaic::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::string output = "comparison";
};

int run_compare(const Options& options) {
  MOESAIC_CHECK(options.runs.size() > 1, UsageError, "compare: got one run, expected at least two folders of runs");
  run::check_comparison_files(options.output);
  const OrderedJson comparison = run::compare_runs({options.runs.begin(), options.runs.end()});
  run::write_comparison(options.output, comparison);
  say("{0}\nWritten: {1}.html, {1}.csv and {1}.json\n", run::comparison_table(comparison), options.output);
  return 0;
}

}  // namespace

Runner add_compare(CLI::App& app, CommonOptions&) {
  auto options = std::make_shared<Options>();
  app.add_option("runs", options->runs, "Output folders of `train`")->required();
  app.add_option("-o,--output", options->output, "Where to write: PATH.html, PATH.csv and PATH.json")
      ->capture_default_str();
  return [options] { return run_compare(*options); };
}

}  // namespace moesaic::cli
