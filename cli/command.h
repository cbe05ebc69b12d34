// The frame every verb of the program stands in: cli/<verb>.cpp defines one add_<verb>(), main.cpp lists it in its
// table.
#pragma once
#include <CLI/CLI.hpp>

#include <functional>

#include "cli/streams.h"
#include "moesaic/base/check.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/version.h"

namespace moesaic::cli {

/// The flags every verb has. main.cpp applies log level and threads before the verb runs.
struct CommonOptions {
  std::string log_level = "info";
  int threads = 0;              // 0 = the cores this process may use
  std::string device = "auto";  // parse_device()
  std::string dtype = "auto";   // number_format()
  uint64_t seed = 42;
};

/// Does the verb's work and returns the exit code. Throws moesaic::Error for the user's mistakes; main.cpp reports
/// them.
using Runner = std::function<int()>;

/// Declares a verb's flags on its sub-command and returns its runner. `common` lives as long as the program and holds
/// the user's values once the runner is called; a verb may set other defaults in it here.
using AddVerb = Runner (*)(CLI::App& app, CommonOptions& common);

/// `option`, of a list, takes one value each time it is given, and leaves what stands behind it alone.
CLI::Option* repeated(CLI::Option* option);

Runner add_chat(CLI::App& app, CommonOptions& common);
Runner add_compare(CLI::App& app, CommonOptions& common);
Runner add_compose(CLI::App& app, CommonOptions& common);
Runner add_convert(CLI::App& app, CommonOptions& common);
Runner add_data(CLI::App& app, CommonOptions& common);
Runner add_demo(CLI::App& app, CommonOptions& common);
Runner add_doctor(CLI::App& app, CommonOptions& common);
Runner add_eval(CLI::App& app, CommonOptions& common);
Runner add_export(CLI::App& app, CommonOptions& common);
Runner add_generate(CLI::App& app, CommonOptions& common);
Runner add_inspect(CLI::App& app, CommonOptions& common);
Runner add_merge(CLI::App& app, CommonOptions& common);
Runner add_mix(CLI::App& app, CommonOptions& common);
Runner add_models(CLI::App& app, CommonOptions& common);
Runner add_routes(CLI::App& app, CommonOptions& common);
Runner add_score(CLI::App& app, CommonOptions& common);
Runner add_serve(CLI::App& app, CommonOptions& common);
Runner add_study(CLI::App& app, CommonOptions& common);
Runner add_train(CLI::App& app, CommonOptions& common);
Runner add_upcycle(CLI::App& app, CommonOptions& common);

/// For a demo: the folder is new, empty, or that of a demo which didn't come to its end.
FolderLock take_demo_folder(const std::filesystem::path& dir, const std::filesystem::path& model);

/// `moesaic demo calm`.
Runner add_calm_demo(CLI::App& app, CommonOptions& common);

}  // namespace moesaic::cli
