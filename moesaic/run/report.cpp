#include "moesaic/run/report.h"

#include <fnmatch.h>

#include "moesaic/base/check.h"
#include "moesaic/eval/page.h"
#include "moesaic/eval/pages.h"
#include "moesaic/run/pages.h"

namespace moesaic::run {

namespace fs = std::filesystem;

namespace {

constexpr std::chrono::seconds kBetweenWrites{5};

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02} {:02}:{:02}:{:02} UTC", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
                     utc.tm_hour, utc.tm_min, utc.tm_sec);
}

/// Drops what earlier processes logged of steps that are run again.
void drop_from(OrderedJson& rows, int64_t step) {
  while (!rows.empty() && rows.back().value("step", int64_t{0}) >= step) rows.erase(rows.size() - 1);
}

}  // namespace

Report::Report(fs::path dir, const OrderedJson& facts, bool resumed) : dir_(std::move(dir)) {
  report_ = {{"status", "running"}, {"message", ""}, {"started", now()}, {"written", ""}, {"seconds", 0.0}};
  report_.update(facts);
  for (const char* list : {"data", "log", "routing", "routing_layers", "samples"}) {
    if (!report_.contains(list)) report_[list] = OrderedJson::array();
  }
  if (!resumed || !fs::exists(dir_ / kReportFile)) return;
  const Json earlier = read_report(dir_);
  for (const char* key : {"started", "log", "routing", "routing_layers", "samples", "samples_from"}) {
    if (earlier.contains(key)) report_[key] = earlier[key];
  }
  earlier_seconds_ = earlier.value("seconds", 0.0);
}

void Report::add(const Json& row) {
  const auto step = row.value("step", int64_t{0});
  if (fresh_) {
    for (const char* list : {"log", "routing"}) drop_from(report_[list], step);
    fresh_ = false;
  }
  if (row.contains("split")) {
    report_["routing_layers"] = row.value("layers", Json::array());
    OrderedJson means = row;
    means.erase("layers");
    report_["routing"].push_back(means);
  } else {
    report_["log"].push_back(OrderedJson(row));
    report_["steps"] = step;
    if (row.contains("tokens")) report_["tokens"] = row["tokens"];
  }
  if (Clock::now() - written_ > kBetweenWrites) write();
}

void Report::write() {
  report_["written"] = now();
  report_["seconds"] = earlier_seconds_ + std::chrono::duration<double>(Clock::now() - begin_).count();
  const std::string json = report_.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
  write_file_atomically(dir_ / kReportFile, json);
  write_file_atomically(dir_ / "report.html", eval::page_of(kReportHtml, {eval::kUplotCss},
                                                            {eval::kUplotJs, eval::kPlotsJs, kReportJs}, report_));
  written_ = Clock::now();
}

Json reported_figure(const Json& report, const std::string& key, const Means& means, bool before) {
  if (const auto mean = means.find(key); mean != means.end()) {
    std::set<std::string> keys;
    for (const Json& row : report.at("log")) {
      for (const auto& [name, value] : row.items()) {
        if (!name.starts_with("eval") || !value.is_number()) continue;
        for (const std::string& pattern : mean->second) {
          if (fnmatch(pattern.c_str(), name.c_str(), 0) == 0) keys.insert(name);
        }
      }
    }
    double sum = 0;
    for (const std::string& name : keys) {
      const Json value = reported_figure(report, name, {}, before);
      if (!value.is_number()) return nullptr;
      sum += value.get<double>();
    }
    return keys.empty() ? Json() : Json(sum / static_cast<double>(keys.size()));
  }
  const Json held = report.value("weights_of", Json());
  Json last;
  for (const Json& row : report.at("log")) {
    if (!row.contains(key) || (row.value("step", 0) == 0) != before) continue;
    const Json of = row.value("weights_of_step", row.at("step"));
    if (before || held.is_null() || of == held || last.is_null()) last = row.at(key);
  }
  return last;
}

Json read_report(const fs::path& dir) {
  const fs::path path = dir / kReportFile;
  MOESAIC_CHECK(fs::exists(path), UsageError,
                "{}: got no {} in it, expected the output folder of a run of `moesaic train`", dir.string(),
                kReportFile);
  const Json report = read_json(path);
  for (const char* list : {"log", "routing", "data", "samples"}) get<std::vector<Json>>(report, list, path.string());
  get<std::map<std::string, Json>>(report, "settings", path.string());
  return report;
}

}  // namespace moesaic::run
