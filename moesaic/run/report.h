// The page of a run: report.json and report.html in its folder, written as it goes and at its end.
#pragma once
#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::run {

constexpr const char* kReportFile = "report.json";
/// The score, among those of tasks, of how much routers tell tasks apart (moe::task_information).
constexpr const char* kTaskInformation = "routing/task_information";

/// Everything that is told of a run. report.json:
///
///   {moesaic, libtorch, command, machine, threads, device, dtype, started, written, status, message, seconds, model,
///    finetuning_type, trainable, base_parameters, settings, steps, max_steps, tokens, weights_of, best,
///    peak_memory_bytes, result_bytes, data: [{name, rows, rate, drawn, skipped, targets}], log: train_log.jsonl's
///    rows, routing: [{step, entropy_share, load_cv, max_load}], routing_layers: the last one's layers, samples_from,
///    samples: [{data_set, prompt, reference, before, after}]}
///
/// status: running | finished | stopped early | interrupted | failed
class Report {
 public:
  /// `facts` are what is known before the first step. A run that is resumed goes on with what an earlier report of the
  /// folder tells: its log, its seconds, the answers before training.
  Report(std::filesystem::path dir, const OrderedJson& facts, bool resumed);

  /// A row of the journal: of steps, of an evaluation, or (with a "split") of routing. Writes, but not too often.
  void add(const Json& row);
  OrderedJson& operator[](const char* key) { return report_[key]; }
  /// True when the answers before training are known from an earlier report.
  bool has_samples() const { return !report_["samples"].empty(); }
  /// Throws DataError when the files can't be written.
  void write();

 private:
  using Clock = std::chrono::steady_clock;

  std::filesystem::path dir_;
  OrderedJson report_;
  bool fresh_ = true;           // no row of this process yet
  double earlier_seconds_ = 0;  // of the processes before
  Clock::time_point begin_ = Clock::now(), written_{};
};

/// Figures that are means of others: name to patterns of scores, "eval/*/acc", where * stands for any characters.
using Means = std::map<std::string, std::vector<std::string>>;
/// What a report's log says of `key`, or of one of `means`: of the weights that the folder holds, or of those before
/// the first step. Null: nothing.
Json reported_figure(const Json& report, const std::string& key, const Means& means = {}, bool before = false);

/// A run's report.json. Throws UsageError when `dir` has none, DataError when it is none.
Json read_report(const std::filesystem::path& dir);

}  // namespace moesaic::run
