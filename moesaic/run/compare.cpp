#include "moesaic/run/compare.h"

#include "moesaic/base/check.h"
#include "moesaic/base/csv.h"
#include "moesaic/eval/page.h"
#include "moesaic/eval/pages.h"
#include "moesaic/run/pages.h"
#include "moesaic/run/report.h"

namespace moesaic::run {

namespace fs = std::filesystem;

namespace {

constexpr const char* kTitle = "<title>Moesaic: runs compared</title>";
constexpr const char* kEntropyShare = "router_entropy_share";  // of the last steps, over all routers
constexpr std::string_view kCsvHead = "name,runs,";

/// A run as its report tells of it.
struct RunReport {
  fs::path dir;
  std::string group;  // its group's name; "" = of the folders
  Json report;
  std::map<std::string, Json> settings;  // "router.top_k": 2; without what does not make it another run

  Json figure(const std::string& name, const Means& means) const {
    const Json& routing = report.at("routing");
    if (name == kEntropyShare) return routing.empty() ? Json() : routing.back().value("entropy_share", Json());
    return report.contains(name) ? report.at(name) : reported_figure(report, name, means);
  }
};

void flatten(const Json& json, const std::string& prefix, std::map<std::string, Json>& flat) {
  static const std::set<std::string> kSame{"seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"};
  for (const auto& [key, value] : json.items()) {
    if (value.is_object() && !value.empty()) {
      flatten(value, prefix + key + ".", flat);
    } else if (!kSame.contains(prefix + key)) {
      flat[prefix + key] = value;
    }
  }
}

RunReport read_run(const fs::path& dir, const std::string& group) {
  RunReport run{dir, group, read_report(dir), {}};
  flatten(run.report.at("settings"), "", run.settings);
  return run;
}

std::string name_of(const fs::path& dir) {
  const fs::path whole = fs::absolute(dir).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

/// The name that the runs were given, else what their folders' names begin with in common; of one run its folder's.
std::string name_of(const std::vector<const RunReport*>& runs) {
  if (!runs[0]->group.empty()) return runs[0]->group;
  std::string name = name_of(runs[0]->dir);
  for (const RunReport* run : runs) {
    const std::string other = name_of(run->dir);
    name.resize(std::mismatch(name.begin(), name.end(), other.begin(), other.end()).first - name.begin());
  }
  while (runs.size() > 1 && !name.empty() && !std::isalnum(static_cast<unsigned char>(name.back()))) name.pop_back();
  return name.empty() ? name_of(runs[0]->dir) : name;
}

OrderedJson figure(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {{"mean", mean},
          {"std", values.size() > 1 ? OrderedJson(std::sqrt(squares / (n - 1))) : OrderedJson()},
          {"n", values.size()},
          {"values", values}};
}

/// What every run of the group measured at a step, over the steps that all have.
OrderedJson curve(const std::vector<const RunReport*>& runs, const std::string& key) {
  std::map<int64_t, std::vector<double>> at;
  for (const RunReport* run : runs) {
    for (const Json& row : run->report.at("log")) {
      if (row.contains(key) && row[key].is_number() && !row.contains("weights_of_step")) {
        at[row.at("step").get<int64_t>()].push_back(row[key].get<double>());
      }
    }
  }
  OrderedJson points = OrderedJson::array(), low = points, high = points;
  for (const auto& [step, values] : at) {
    if (values.size() != runs.size()) continue;
    points.push_back({step, figure(values)["mean"]});
    low.push_back({step, *std::min_element(values.begin(), values.end())});
    high.push_back({step, *std::max_element(values.begin(), values.end())});
  }
  return {{"points", points}, {"low", low}, {"high", high}};
}

/// The measured keys of the logs, losses first: "eval_loss", "eval/rte/acc".
std::vector<std::string> measured(const std::vector<RunReport>& runs, const Means& means) {
  std::vector<std::string> keys;
  for (const auto& [name, patterns] : means) keys.push_back(name);
  keys.emplace_back("eval_loss");
  for (const char* kind : {"eval_", "eval/"}) {
    std::set<std::string> found;
    for (const RunReport& run : runs) {
      for (const Json& row : run.report.at("log")) {
        for (const auto& [key, value] : row.items()) {
          if (key.starts_with(kind) && value.is_number() && key != "eval_loss") found.insert(key);
        }
      }
    }
    keys.insert(keys.end(), found.begin(), found.end());
  }
  keys.emplace_back("loss");
  return keys;
}

std::string shown(const OrderedJson& value) { return value.is_string() ? value.get<std::string>() : value.dump(); }

std::string shown_figure(const std::string& name, const OrderedJson& figure) {
  static const std::set<std::string> kCounts{"trainable", "steps", "tokens"}, kRough{"seconds", "tokens_per_second"};
  if (figure.is_null()) return "";
  const bool bytes = name.ends_with("_bytes");
  auto number = [&](double value) {
    if (bytes) value /= 1 << 20;
    if (kCounts.contains(name) || std::abs(value) >= 1000) return fmt::format("{:.0f}", value);
    return bytes || kRough.contains(name) ? fmt::format("{:.1f}", value) : fmt::format("{:.4f}", value);
  };
  const std::string mean = number(figure["mean"].get<double>());
  if (figure["std"].is_null() || figure["std"] == 0.0) return mean;
  return fmt::format("{} ± {}", mean, number(figure["std"].get<double>()));
}

std::string label(const std::string& name) {
  return name.ends_with("_bytes") ? name.substr(0, name.size() - 6) + "_mib" : name;
}

/// Characters, where every code point is as wide as any.
size_t columns(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

std::string padded(const std::string& text, size_t width) {
  return text + std::string(width - std::min(width, columns(text)), ' ');
}

std::string runs_of(const OrderedJson& group) {
  std::vector<std::string> parts;
  for (const auto& [status, count] : group["status"].items()) {
    parts.push_back(fmt::format("{} {}", count.get<int64_t>(), status));
  }
  return fmt::format("{}", fmt::join(parts, ", "));
}

/// What all runs measured alike before their first step, as a group; null where there is nothing.
OrderedJson before_training(const std::vector<RunReport>& runs, const std::vector<std::string>& names,
                            const Means& means) {
  OrderedJson row{{"name", "before training"},         {"runs", OrderedJson::array()},
                  {"seeds", OrderedJson::array()},     {"status", OrderedJson::object()},
                  {"settings", OrderedJson::object()}, {"figures", OrderedJson::object()},
                  {"curves", OrderedJson::object()}};
  for (const std::string& name : names) {
    std::set<double> values;
    for (const RunReport& run : runs) {
      const Json value = reported_figure(run.report, name, means, /*before=*/true);
      if (value.is_number()) values.insert(value.get<double>());
    }
    if (values.size() == 1) row["figures"][name] = figure({*values.begin()});
  }
  return row["figures"].empty() ? OrderedJson() : row;
}

}  // namespace

OrderedJson compare_runs(const std::vector<fs::path>& dirs, const Means& means, const std::vector<std::string>& names) {
  std::vector<RunReport> runs;
  for (size_t i = 0; i < dirs.size(); ++i) runs.push_back(read_run(dirs[i], names.empty() ? "" : names[i]));

  std::vector<std::vector<const RunReport*>> groups;
  for (const RunReport& run : runs) {
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const auto& known) { return known[0]->settings == run.settings; });
    if (group == groups.end()) {
      groups.push_back({&run});
    } else {
      group->push_back(&run);
    }
  }
  std::map<std::string, std::set<Json>> seen;
  for (const RunReport& run : runs) {
    for (const auto& [key, value] : run.settings) seen[key];
  }
  for (auto& [key, values] : seen) {
    for (const auto& group : groups) {
      const auto value = group[0]->settings.find(key);
      values.insert(value == group[0]->settings.end() ? Json() : value->second);
    }
  }
  std::vector<std::string> keys;
  for (const auto& [key, values] : seen) {
    if (values.size() > 1) keys.push_back(key);
  }

  const std::vector<std::string> logged = measured(runs, means);
  std::vector<std::string> figures = logged;
  for (const char* fact : {kEntropyShare, "trainable", "steps", "tokens", "seconds", "tokens_per_second",
                           "peak_memory_bytes", "result_bytes"}) {
    figures.emplace_back(fact);
  }
  OrderedJson result{{"comparison", OrderedJson::array()}, {"keys", keys}, {"figures", OrderedJson::array()}};
  std::set<std::string> present;
  if (OrderedJson row = before_training(runs, logged, means); !row.is_null()) {
    for (const std::string& key : keys) row["settings"][key] = nullptr;
    for (const auto& [name, value] : row["figures"].items()) present.insert(name);
    result["comparison"].push_back(row);
  }
  for (const auto& group : groups) {
    OrderedJson row{
        {"name", name_of(group)},          {"runs", OrderedJson::array()},      {"seeds", OrderedJson::array()},
        {"status", OrderedJson::object()}, {"settings", OrderedJson::object()}, {"figures", OrderedJson::object()},
        {"curves", OrderedJson::object()}};
    for (const RunReport* run : group) {
      row["runs"].push_back(run->dir.string());
      row["seeds"].push_back(OrderedJson(run->report["settings"].value("seed", Json())));
      OrderedJson& count = row["status"][run->report.value("status", "running")];
      count = (count.is_null() ? 0 : count.get<int64_t>()) + 1;
    }
    for (const std::string& key : keys) {
      const auto value = group[0]->settings.find(key);
      row["settings"][key] = OrderedJson(value == group[0]->settings.end() ? Json() : value->second);
    }
    for (const std::string& name : figures) {
      std::vector<double> values;
      for (const RunReport* run : group) {
        const Json value = run->figure(name, means);
        if (value.is_number()) values.push_back(value.get<double>());
      }
      if (values.empty()) continue;
      row["figures"][name] = figure(values);
      present.insert(name);
    }
    for (const std::string& name : logged) {
      if (present.contains(name)) row["curves"][name] = curve(group, name);
    }
    result["comparison"].push_back(row);
  }
  for (const std::string& name : figures) {
    if (present.contains(name)) result["figures"].push_back(name);
  }
  return result;
}

std::string comparison_table(const OrderedJson& comparison) {
  constexpr size_t kWidth = 120;
  std::vector<std::vector<std::string>> lines{{""}, {"runs"}};  // cells; the first is the label
  for (const OrderedJson& key : comparison["keys"]) lines.push_back({shown(key)});
  for (const OrderedJson& name : comparison["figures"]) lines.push_back({label(shown(name))});
  for (const OrderedJson& group : comparison["comparison"]) {
    size_t line = 0;
    lines[line++].push_back(shown(group["name"]));
    lines[line++].push_back(runs_of(group));
    for (const OrderedJson& key : comparison["keys"]) lines[line++].push_back(shown(group["settings"][shown(key)]));
    for (const OrderedJson& name : comparison["figures"]) {
      lines[line++].push_back(shown_figure(shown(name), group["figures"].value(shown(name), OrderedJson())));
    }
  }
  const size_t count = lines[0].size();
  std::vector<size_t> widths(count, 0);
  for (const auto& line : lines) {
    for (size_t c = 0; c < count; ++c) widths[c] = std::max(widths[c], columns(line[c]));
  }
  std::string text;
  for (size_t begin = 1; begin < count;) {  // as many columns side by side as fit
    size_t end = begin, width = widths[0];
    while (end < count && (end == begin || width + widths[end] + 2 <= kWidth)) width += widths[end++] + 2;
    if (!text.empty()) text += "\n";
    for (const auto& line : lines) {
      std::string row = padded(line[0], widths[0]);
      for (size_t c = begin; c < end; ++c) row += "  " + padded(line[c], widths[c]);
      text += row.substr(0, row.find_last_not_of(' ') + 1) + "\n";
    }
    begin = end;
  }
  return text;
}

std::string comparison_csv(const OrderedJson& comparison) {
  std::string text(kCsvHead.substr(0, kCsvHead.size() - 1));
  for (const OrderedJson& key : comparison["keys"]) text += "," + csv_cell(shown(key));
  for (const OrderedJson& name : comparison["figures"]) {
    for (const char* part : {"", "_std", "_n"}) text += "," + csv_cell(shown(name) + part);
  }
  text += "\n";
  for (const OrderedJson& group : comparison["comparison"]) {
    text += csv_cell(shown(group["name"])) + "," + std::to_string(group["runs"].size());
    for (const OrderedJson& key : comparison["keys"]) {
      const OrderedJson& value = group["settings"][shown(key)];
      text += "," + (value.is_null() ? "" : csv_cell(shown(value)));
    }
    for (const OrderedJson& name : comparison["figures"]) {
      const OrderedJson figure = group["figures"].value(shown(name), OrderedJson());
      for (const char* part : {"mean", "std", "n"}) {
        text += "," + (figure.is_null() || figure[part].is_null() ? "" : figure[part].dump());
      }
    }
    text += "\n";
  }
  return text;
}

std::string comparison_html(const OrderedJson& comparison) {
  return eval::page_of(kCompareHtml, {eval::kUplotCss}, {eval::kUplotJs, eval::kPlotsJs, kCompareJs}, comparison);
}

namespace {

constexpr const char* kEndings[] = {".json", ".csv", ".html"};

/// Whether `text` is one of the three files.
bool is_comparison(std::string_view text) {
  return text.starts_with(kCsvHead) || text.find(kTitle) != std::string_view::npos ||
         text.substr(0, 40).find("\"comparison\":") != std::string_view::npos;
}

}  // namespace

void check_comparison_files(const fs::path& path) {
  for (const char* ending : kEndings) {
    const fs::path file = path.string() + ending;
    MOESAIC_CHECK(!fs::exists(file) || is_comparison(read_file(file)), UsageError,
                  "{}: got a file that holds no comparison, expected none: nothing is overwritten", file.string());
  }
}

void write_comparison(const fs::path& path, const OrderedJson& comparison) {
  check_comparison_files(path);
  if (path.has_parent_path()) fs::create_directories(path.parent_path());
  const std::string json = comparison.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
  const std::string files[] = {json, comparison_csv(comparison), comparison_html(comparison)};
  for (size_t i = 0; i < std::size(files); ++i) write_file_atomically(path.string() + kEndings[i], files[i]);
}

}  // namespace moesaic::run
