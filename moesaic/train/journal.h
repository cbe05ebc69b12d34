// What a run leaves to read: train_log.jsonl, router_stats.jsonl, TensorBoard events and the history of its state.
#pragma once
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/moe/routing_stats.h"
#include "moesaic/train/event_writer.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// Appends JSON lines. A resumed run first drops the lines of steps that are run again.
class JsonLines {
 public:
  JsonLines(const std::filesystem::path& path, int64_t resumed_step);
  /// Throws DataError when the row can't be written.
  void write(const Json& row);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

/// Opened when the run's first step is known; writes where `report_to` says.
class Journal {
 public:
  /// on_row: gets every row as well, whatever `report_to` says; may be empty.
  Journal(const TrainConfig& config, int64_t epoch_size, const std::function<void(const Json& row)>& on_row)
      : config_(config), epoch_size_(epoch_size), on_row_(on_row) {}

  /// Opens the files of a run that goes on behind step `resumed`.
  void open(int64_t resumed);
  /// True when the routing of `step` is wanted.
  bool logs_routing(int64_t step) const;
  /// Counts one step into the next row.
  void add(double loss, double aux_loss);
  /// A row of the steps since the last one. examples: seen so far.
  void write_step(const StepLog& log, int64_t examples, const moe::RoutingStats& routing);
  /// What an evaluation found: {"eval_loss", 1.2} or {"eval/rte/acc", 0.6}. `weights_of`: the step whose weights were
  /// evaluated.
  void write_evaluation(int64_t step, int64_t weights_of, const Scores& scores);

  const Json& history() const { return history_; }
  /// What a checkpoint keeps of it beside the history, and back.
  Json state() const;
  void set_state(const Json& state, Json history, const std::string& where);

 private:
  bool reports_to(const std::string& target) const;
  void report_events(const std::string& prefix, const Json& row, int64_t step);
  void write_row(const Json& row);

  const TrainConfig& config_;
  int64_t epoch_size_;
  const std::function<void(const Json& row)>& on_row_;
  double window_loss_ = 0, window_aux_loss_ = 0;  // sums since the last row
  int64_t window_steps_ = 0;
  Json history_ = Json::array();
  bool warned_of_collapse_ = false;
  std::optional<JsonLines> log_, router_log_;
  std::optional<EventWriter> events_;
};

}  // namespace moesaic::train
