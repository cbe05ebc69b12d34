// Runs side by side: what their settings differ in, and what came of it.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::run {

/// Reads the report.json of each folder. Runs that differ in their seed and folder only are one group.
///
///   {"comparison": [{"name", "runs": [folder], "seeds", "status": {status: runs},
///                    "settings": {key: value, of those that differ between groups},
///                    "figures": {name: {"mean", "std": sample deviation or null, "n", "values"}},
///                    "curves": {name: {"points", "low", "high": [[step, value]]}}}],
///    "keys": [settings that differ], "figures": [names, in the order of a table]}
///
/// Figures are of the weights that the folder holds. Throws UsageError for fewer than two runs, or a folder without a
/// report.
OrderedJson compare_runs(const std::vector<std::filesystem::path>& dirs);

/// For a terminal: a line per setting and figure, a column per group.
std::string comparison_table(const OrderedJson& comparison);
/// A row per group: name, runs, the settings, and mean, std and n of every figure. RFC 4180.
std::string comparison_csv(const OrderedJson& comparison);
std::string comparison_html(const OrderedJson& comparison);
/// Whether `text` is one of the three files, which may be replaced by a newer one.
bool is_comparison(std::string_view text);

}  // namespace moesaic::run
