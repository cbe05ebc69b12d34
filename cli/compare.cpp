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
  const std::filesystem::path base = options.output;
  for (const char* ending : {".json", ".csv", ".html"}) {
    const std::filesystem::path path = base.string() + ending;
    MOESAIC_CHECK(!std::filesystem::exists(path) || run::is_comparison(read_file(path)), UsageError,
                  "--output {}: got a file that `compare` did not write, expected none: nothing is overwritten",
                  path.string());
  }
  const OrderedJson comparison = run::compare_runs({options.runs.begin(), options.runs.end()});
  if (base.has_parent_path()) std::filesystem::create_directories(base.parent_path());
  write_file_atomically(base.string() + ".json",
                        comparison.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  write_file_atomically(base.string() + ".csv", run::comparison_csv(comparison));
  write_file_atomically(base.string() + ".html", run::comparison_html(comparison));
  say("{0}\nWritten: {1}.html, {1}.csv and {1}.json\n", run::comparison_table(comparison), base.string());
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
