// Runs side by side: what their settings differ in, and what came of it.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/run/report.h"

namespace moesaic::run {

/// Reads the report.json of each folder. Runs that differ in their seed and folder only are one group.
///
///   {"comparison": [{"name", "runs": [folder], "seeds", "status": {status: runs},
///                    "settings": {key: value, of those that differ between groups},
///                    "figures": {name: {"mean", "std": sample deviation or null, "n", "values"}},
///                    "curves": {name: {"points", "low", "high": [[step, value]]}}}],
///    "keys": [settings that differ], "figures": [names, in the order of a table]}
///
/// Figures are of the weights that the folder holds. What all of them measured alike before their first step is
/// the first group, "before training", without runs. Throws UsageError for fewer than two runs, or a folder without
/// a report. `names` are those of the runs' groups; empty: what the folders' names have in common.
OrderedJson compare_runs(const std::vector<std::filesystem::path>& dirs, const Means& means = {},
                         const std::vector<std::string>& names = {});

/// For a terminal: a line per setting and figure, a column per group.
std::string comparison_table(const OrderedJson& comparison);
/// A row per group: name, runs, the settings, and mean, std and n of every figure. RFC 4180.
std::string comparison_csv(const OrderedJson& comparison);
std::string comparison_html(const OrderedJson& comparison);

/// The three files of a comparison, PATH.json, .csv and .html. Throws UsageError where something else stands.
void check_comparison_files(const std::filesystem::path& path);
void write_comparison(const std::filesystem::path& path, const OrderedJson& comparison);

}  // namespace moesaic::run
