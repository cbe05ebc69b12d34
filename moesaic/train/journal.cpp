#include "moesaic/train/journal.h"

#include <cerrno>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"

namespace moesaic::train {

namespace fs = std::filesystem;

JsonLines::JsonLines(const fs::path& path, int64_t resumed_step) : path_(path) {
  std::string kept;
  if (resumed_step > 0 && fs::exists(path)) {
    std::istringstream lines(read_file(path));
    for (std::string line; std::getline(lines, line);) {
      const Json row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (row.is_object() && row.value("step", int64_t{0}) <= resumed_step) kept += line + "\n";
    }
  }
  write_file_atomically(path, kept);
  file_.open(path, std::ios::app);
  MOESAIC_CHECK(file_, DataError, "{}: can't be written", path.string());
}

void JsonLines::write(const Json& row) {
  errno = 0;
  file_ << row.dump() << std::endl;
  MOESAIC_CHECK(file_, DataError, "{}: can't be written: {}", path_.string(), refusal(errno));
}

bool Journal::reports_to(const std::string& target) const {
  return !config_.output_dir.empty() &&
         std::find(config_.report_to.begin(), config_.report_to.end(), target) != config_.report_to.end();
}

bool Journal::logs_routing(int64_t step) const {
  return (reports_to("jsonl") || on_row_) && step % config_.logging_steps == 0;
}

void Journal::open(int64_t resumed) {
  if (reports_to("jsonl")) {
    log_.emplace(config_.output_dir / "train_log.jsonl", resumed);
    router_log_.emplace(config_.output_dir / "router_stats.jsonl", resumed);
  }
  if (reports_to("tensorboard")) events_.emplace(config_.output_dir / "tensorboard");
}

void Journal::add(double loss, double aux_loss) {
  window_loss_ += loss;
  window_aux_loss_ += aux_loss;
  ++window_steps_;
}

void Journal::write_step(const StepLog& log, int64_t examples, const moe::RoutingStats& routing) {
  Json row{{"step", log.step},
           {"loss", window_loss_ / static_cast<double>(window_steps_)},
           {"learning_rate", log.learning_rate},
           {"grad_norm", log.grad_norm}};
  if (epoch_size_ > 0) row["epoch"] = static_cast<double>(examples) / static_cast<double>(epoch_size_);
  if (config_.moe_aux_loss_coef > 0 || config_.router_z_loss_coef > 0) {
    row["aux_loss"] = window_aux_loss_ / static_cast<double>(window_steps_);
  }
  window_loss_ = window_aux_loss_ = 0;
  window_steps_ = 0;
  history_.push_back(row);
  row["tokens"] = log.tokens;
  row["tokens_per_second"] = log.tokens_per_second;
  write_row(row);
  report_events("train/", row, log.step);
  if (routing.empty()) return;
  Json stats = routing.summary();
  stats["step"] = log.step;
  stats["split"] = "train";
  if (router_log_) router_log_->write(stats);
  if (on_row_) on_row_(stats);
  if (const auto [load, router] = routing.largest_load(); load > 0.9 && !warned_of_collapse_) {
    spdlog::warn(
        "step {}: one expert has {:.0f} % of the weight at {}: the router collapsed; try a lower "
        "router_learning_rate or moe_aux_loss_coef",
        log.step, 100 * load, router);
    warned_of_collapse_ = true;
  }
}

void Journal::write_evaluation(int64_t step, int64_t weights_of, const Scores& scores) {
  Json row{{"step", step}}, events = Json::object();
  if (weights_of != step) row["weights_of_step"] = weights_of;
  std::string text;
  for (const auto& [name, value] : scores) {
    row[name] = value;
    events[name.starts_with("eval/") ? name.substr(5) : name] = value;
    text += fmt::format(", {} {:.4f}", name, value);
  }
  spdlog::info("step {}{}{}", step, weights_of != step ? fmt::format(" (weights of step {})", weights_of) : "", text);
  history_.push_back(row);
  write_row(row);
  report_events("eval/", events, step);
}

void Journal::write_row(const Json& row) {
  if (log_) log_->write(row);
  if (on_row_) on_row_(row);
}

void Journal::report_events(const std::string& prefix, const Json& row, int64_t step) {
  if (!events_) return;
  for (const auto& [key, value] : row.items()) {
    if (key != "step" && value.is_number()) events_->add_scalar(prefix + key, value.get<double>(), step);
  }
  events_->flush();
}

Json Journal::state() const {
  return {{"window_loss", window_loss_}, {"window_aux_loss", window_aux_loss_}, {"window_steps", window_steps_}};
}

void Journal::set_state(const Json& state, Json history, const std::string& where) {
  history_ = std::move(history);
  window_loss_ = get<double>(state, "window_loss", where);
  window_aux_loss_ = get<double>(state, "window_aux_loss", where);
  window_steps_ = get<int64_t>(state, "window_steps", where);
}

}  // namespace moesaic::train
