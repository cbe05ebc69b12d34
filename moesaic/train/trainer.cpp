#include "moesaic/train/trainer.h"

#include <cstdlib>

#include "moesaic/base/check.h"
#include "moesaic/base/sha256.h"
#include "moesaic/ranks/deal.h"
#include "moesaic/train/checkpoint.h"
#include "moesaic/train/checkpointed_blocks.h"
#include "moesaic/train/journal.h"
#include "moesaic/train/schedules.h"
#include "moesaic/train/step.h"
#include "moesaic/train/train_keys.h"

namespace moesaic::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// While it lives, operations without a deterministic algorithm throw instead of being run (where `on`).
class DeterministicAlgorithms {
 public:
  DeterministicAlgorithms(bool on, torch::Device device) {
    if (!on) return;
    MOESAIC_CHECK(
        device.is_cpu() || std::getenv("CUBLAS_WORKSPACE_CONFIG") != nullptr, UsageError,
        "deterministic: got no CUBLAS_WORKSPACE_CONFIG in the environment, expected :4096:8: without it cuBLAS "
        "has no deterministic algorithm");
    context().setDeterministicAlgorithms(true, /*warn_only=*/false);
    context().setDeterministicFillUninitializedMemory(false);  // a debugging aid that costs time
  }
  ~DeterministicAlgorithms() {
    context().setDeterministicAlgorithms(before_, warn_before_);
    context().setDeterministicFillUninitializedMemory(fill_before_);
  }
  DeterministicAlgorithms(const DeterministicAlgorithms&) = delete;
  DeterministicAlgorithms& operator=(const DeterministicAlgorithms&) = delete;

 private:
  static at::Context& context() { return at::globalContext(); }
  const bool before_ = context().deterministicAlgorithms();
  const bool warn_before_ = context().deterministicAlgorithmsWarnOnly();
  const bool fill_before_ = context().deterministicFillUninitializedMemory();
};

bool is_loss(const std::string& metric) { return !metric.starts_with("eval/"); }

int64_t warmup_of(const TrainConfig& config, int64_t max_steps) {
  if (config.warmup_steps > 0) return config.warmup_steps;
  return static_cast<int64_t>(std::ceil(static_cast<double>(max_steps) * config.warmup_ratio));
}

/// One run: the loop, its evaluations and its checkpoints.
class Run {
 public:
  Run(models::LanguageModel& model, nn::Learner& learner, data::ExampleStream& stream,
      const std::vector<EvalSet>& eval_sets, const TrainConfig& config, int64_t epoch_size, const TrainHooks& hooks)
      : model_(model),
        learner_(learner),
        eval_sets_(eval_sets),
        config_(config),
        epoch_size_(epoch_size),
        hooks_(hooks),
        max_steps_(steps_of(config, epoch_size)),
        warmup_steps_(warmup_of(config, max_steps_)),
        reader_(stream, config),
        group_(*hooks.group),
        stepper_(model, learner, config, hooks.group),
        journal_(config, epoch_size, hooks.on_row) {}

  /// What execute() does before its first step, without writing.
  void check_start() {
    const DeterministicAlgorithms deterministic(config_.deterministic, model_.facts().device);
    resume();
  }

  TrainResult execute() {
    const DeterministicAlgorithms deterministic(config_.deterministic, model_.facts().device);
    if (group_.first()) prepare_output();
    group_.begin();
    resume();
    if (group_.first()) journal_.open(step_);
    if (step_ == 0 && config_.eval_on_start && !eval_sets_.empty()) evaluate();
    if (step_ == 0 && hooks_.evaluate_tasks) evaluate_tasks(0);
    const int64_t first_step = step_;
    const auto begin = Clock::now();
    double loss_sum = 0;
    const bool stops_early = config_.early_stopping_patience > 0;
    const bool ends_with_best = stops_early || config_.load_best_model_at_end;
    TrainResult result{};
    while (step_ < max_steps_ && !result.stopped_early) {
      const auto step_begin = Clock::now();
      const std::vector<MicroBatch> batches = reader_.next_step();
      if (batches.empty()) break;
      moe::RoutingStats routing;
      StepLog log = make_step(batches, routing);
      log.seconds = seconds_since(begin);
      log.tokens_per_second = static_cast<double>(log.tokens) / seconds_since(step_begin);
      log.tokens = tokens_;
      log.eta = log.seconds / static_cast<double>(step_ - first_step) * static_cast<double>(max_steps_ - step_);
      loss_sum += log.loss;
      if (group_.first() && hooks_.on_log) hooks_.on_log(log);
      if (group_.first() && is_due(config_.logging_steps)) journal_.write_step(log, examples_, routing);

      bool improved = false;
      if (config_.eval_steps > 0 && !eval_sets_.empty() && is_due(config_.eval_steps)) improved = evaluate();
      const bool tasks_due = config_.task_eval_steps > 0 && step_ % config_.task_eval_steps == 0;
      const bool tasks_last = step_ == max_steps_ && !(ends_with_best && is_loss(config_.metric_for_best_model));
      if (hooks_.evaluate_tasks && (tasks_due || tasks_last)) improved = evaluate_tasks(step_) || improved;
      result.stopped_early =
          stops_early && step_ < max_steps_ && evaluations_since_best_ >= config_.early_stopping_patience;
      const bool last = step_ == max_steps_ || result.stopped_early;
      result.interrupted = group_.any(hooks_.stop && hooks_.stop()) && step_ < max_steps_;
      const bool due = config_.save_steps > 0 && (step_ % config_.save_steps == 0 || last || improved);
      if (due || result.interrupted) save(improved);
      if (result.interrupted) break;
    }
    result.weights_of = step_;
    if (ends_with_best && best_ && !result.interrupted) {
      take_best(step_ > first_step);
      result.weights_of = best_->step;
    }
    if (group_.first() && writes_files() && !result.interrupted) {
      learner_.save(config_.output_dir);
      write_file_atomically(config_.output_dir / "trainer_state.json", state_json().dump(2) + "\n");
    }
    result.steps = step_;
    result.train_loss = step_ > first_step ? loss_sum / static_cast<double>(step_ - first_step) : 0.0;
    result.best = best_;
    result.patience = config_.early_stopping_patience;
    result.seconds = seconds_since(begin);
    result.tokens = tokens_;
    return result;
  }

 private:
  bool writes_files() const { return !config_.output_dir.empty(); }
  bool is_due(int64_t steps) const { return step_ % steps == 0 || step_ == max_steps_; }

  void prepare_output() {
    if (!writes_files()) return;
    fs::create_directories(config_.output_dir);
    remove_unfinished(config_.output_dir);
    const auto checkpoints = list_checkpoints(config_.output_dir);
    if (config_.overwrite_output_dir) {
      remove_checkpoints(config_.output_dir);
    } else if (config_.resume_from_checkpoint == "none" && !checkpoints.empty()) {
      throw UsageError(
          fmt::format("output_dir {}: got a folder with {} of an earlier run, expected none\nhint: go on "
                      "with --resume auto, start anew with overwrite_output_dir=true, or choose another "
                      "output_dir",
                      config_.output_dir.string(), checkpoints.back().path.filename().string()));
    }
  }

  StepLog make_step(const std::vector<MicroBatch>& batches, moe::RoutingStats& routing) {
    const double factor = schedule_factor(config_.lr_scheduler_type, step_, warmup_steps_, max_steps_);
    const bool logs_routing = group_.any(journal_.logs_routing(step_ + 1));
    const StepResult made = stepper_.run(batches, step_ + 1, factor, logs_routing ? &routing : nullptr);
    ++step_;
    tokens_ += made.tokens;
    examples_ += made.examples;
    journal_.add(made.loss, made.aux_loss);
    StepLog log{};
    log.step = step_;
    log.max_steps = max_steps_;
    log.loss = made.loss;
    log.aux_loss = made.aux_loss;
    log.grad_norm = made.grad_norm;
    log.learning_rate = config_.learning_rate * factor;
    log.tokens = made.tokens;
    return log;
  }

  /// True when this is the best so far.
  bool evaluate() {
    std::vector<double> losses;
    double sum = 0, targets = 0;
    for (const EvalSet& set : eval_sets_) {
      const double loss = evaluate_loss(model_, set.examples, config_.per_device_train_batch_size, group_);
      MOESAIC_CHECK(
          std::isfinite(loss), DataError,
          "step {}: got an evaluation loss of {} on {}, expected a finite one: the model's numbers overflow, "
          "or the evaluation data meets damaged weights\nhint: a lower learning_rate; earlier checkpoints are "
          "as they were",
          step_, loss, set.name);
      losses.push_back(loss);
      double count = 0;
      for (const data::Example& example : set.examples) count += static_cast<double>(example.targets());
      sum += loss * count;
      targets += count;
    }
    losses.insert(losses.begin(), sum / targets);
    Scores scores;
    for (const std::string& name : loss_names(eval_sets_)) scores.emplace_back(name, losses[scores.size()]);
    if (group_.first()) journal_.write_evaluation(step_, step_, scores);
    return step_ > 0 && judge(scores);
  }

  /// The same for tasks, with the weights of step `weights_of`.
  bool evaluate_tasks(int64_t weights_of) {
    Scores scores = hooks_.evaluate_tasks();
    for (auto& [name, value] : scores) name = "eval/" + name;
    if (group_.first()) journal_.write_evaluation(step_, weights_of, scores);
    scored_step_ = weights_of;
    return weights_of == step_ && step_ > 0 && judge(scores);
  }

  /// Compares what the run is judged by, where `scores` have it, with the best so far.
  bool judge(const Scores& scores) {
    const std::string& metric = config_.metric_for_best_model;
    for (const auto& [name, value] : scores) {
      if (name != metric) continue;
      const bool improved = !best_ || (is_loss(metric) ? value < best_->value : value > best_->value);
      if (improved) best_ = Best{metric, value, step_};
      evaluations_since_best_ = improved ? 0 : evaluations_since_best_ + 1;
      return improved;
    }
    return false;
  }

  /// Goes back to the weights of the best evaluation; `scored`: the tasks are to be scored with them.
  void take_best(bool scored) {
    if (best_->step != step_) learner_.load(config_.output_dir / best_checkpoint_);
    if (hooks_.evaluate_tasks && scored && is_loss(best_->metric) && scored_step_ != best_->step) {
      evaluate_tasks(best_->step);
    }
  }

  Json state_json() const {
    Json state{{"global_step", step_},
               {"max_steps", max_steps_},
               {"num_input_tokens_seen", tokens_},
               {"logging_steps", config_.logging_steps},
               {"eval_steps", config_.eval_steps},
               {"save_steps", config_.save_steps},
               {"train_batch_size", config_.per_device_train_batch_size},
               {"best_metric", best_ ? Json(best_->value) : Json()},
               {"best_global_step", best_ ? Json(best_->step) : Json()},
               {"best_model_checkpoint", best_checkpoint_.empty() ? Json() : Json(best_checkpoint_)},
               {"log_history", journal_.history()}};
    if (epoch_size_ > 0) state["epoch"] = static_cast<double>(examples_) / static_cast<double>(epoch_size_);
    Json own = journal_.state();
    own["sampler"] = reader_.state();
    own["examples"] = examples_;
    own["evaluations_since_best"] = evaluations_since_best_;
    own["config"] = identity(config_, max_steps_);
    state["moesaic"] = std::move(own);
    return state;
  }

  void save(bool is_best) {
    if (!writes_files()) return;
    compare_weights();
    if (is_best) best_checkpoint_ = fmt::format("checkpoint-{}", step_);
    if (!group_.first()) return;
    const TrainerCheckpoint checkpoint{state_json(), stepper_.optimizer().state()};
    write_checkpoint(config_.output_dir, step_, checkpoint, [this](const fs::path& dir) { learner_.save(dir); });
    rotate_checkpoints(config_.output_dir, config_.save_total_limit, step_, best_checkpoint_);
  }

  /// Throws DataError naming the ranks whose weights are not rank 0's.
  void compare_weights() {
    if (group_.size() == 1) return;
    Sha256 digest;
    for (const auto& [name, tensor] : stepper_.optimizer().state()) add_to(digest, tensor);
    for (const nn::Parameter& parameter : learner_.parameters()) add_to(digest, parameter.tensor);
    const std::vector<std::string> all = group_.gather(digest.hex());
    std::vector<size_t> others;
    for (size_t rank = 1; rank < all.size(); ++rank) {
      if (all[rank] != all[0]) others.push_back(rank);
    }
    MOESAIC_CHECK(others.empty(), DataError,
                  "step {}: got other weights at rank {} than at rank 0, expected the same bytes: another kind of "
                  "processor, or damaged memory?\nhint: earlier checkpoints are as they were",
                  step_, fmt::join(others, ", "));
  }

  static void add_to(Sha256& digest, const torch::Tensor& tensor) {
    const torch::Tensor bytes = tensor.detach().cpu().contiguous();
    digest.update({static_cast<const char*>(bytes.data_ptr()), bytes.nbytes()});
  }

  void resume() {
    if (config_.resume_from_checkpoint == "none") return;
    fs::path dir = config_.resume_from_checkpoint;
    if (config_.resume_from_checkpoint == "auto") {
      std::vector<std::string> passed_over;
      const auto newest = newest_checkpoint(config_.output_dir, &passed_over);
      for (const std::string& why : passed_over) spdlog::warn("passed over: {}", why);
      if (!newest) {
        if (!passed_over.empty()) spdlog::warn("{}: no whole checkpoint: beginning anew", config_.output_dir.string());
        return;
      }
      dir = newest->path;
    }
    TrainerCheckpoint checkpoint = read_checkpoint(dir);
    const std::string where = (dir / "trainer_state.json").string();
    const Json own = get<Json>(checkpoint.state, "moesaic", where);
    const Json saved = get<Json>(own, "config", where);
    const Json wanted = identity(config_, max_steps_);
    for (const auto& [key, value] : wanted.items()) {
      MOESAIC_CHECK(key != "optim" || saved.value("optim", value) == value, UsageError,
                    "optim: got {}, expected {} as in {}: the state of one optimiser means nothing to another\nhint: a "
                    "new run that begins with the checkpoint (docs/training.md)",
                    value.dump(), saved.value("optim", value).dump(), dir.string());
      if (saved.contains(key) && saved.at(key) != value) {
        spdlog::warn("{}: was made with {} {}, this run has {}: it goes on with {}", dir.string(), key,
                     saved.at(key).dump(), value.dump(), value.dump());
      }
    }
    learner_.load(dir);
    // Of versions in which chance did not follow from the step.
    for (const char* name : {"random.cpu", "random.device"}) checkpoint.tensors.erase(name);
    stepper_.optimizer().load_state(checkpoint.tensors);
    reader_.set_state(get<Json>(own, "sampler", where));
    step_ = get<int64_t>(checkpoint.state, "global_step", where);
    tokens_ = get<int64_t>(checkpoint.state, "num_input_tokens_seen", where);
    journal_.set_state(own, get<Json>(checkpoint.state, "log_history", where), where);
    const Json best = checkpoint.state.value("best_metric", Json());
    if (!best.is_null() && saved.value("metric_for_best_model", "") == config_.metric_for_best_model) {
      best_ = Best{config_.metric_for_best_model, best.get<double>(),
                   get<int64_t>(checkpoint.state, "best_global_step", where)};
    }
    best_checkpoint_ = get_or<std::string>(checkpoint.state, "best_model_checkpoint", "", where);
    examples_ = get<int64_t>(own, "examples", where);
    evaluations_since_best_ = get<int64_t>(own, "evaluations_since_best", where);
    spdlog::info("resumed from {} at step {} of {}", dir.string(), step_, max_steps_);
  }

  models::LanguageModel& model_;
  nn::Learner& learner_;
  const std::vector<EvalSet>& eval_sets_;
  const TrainConfig& config_;
  int64_t epoch_size_;
  const TrainHooks& hooks_;
  int64_t max_steps_, warmup_steps_;
  BatchReader reader_;
  ranks::Group& group_;
  Stepper stepper_;
  Journal journal_;

  int64_t step_ = 0, tokens_ = 0, examples_ = 0;
  int64_t scored_step_ = -1;  // whose weights the tasks were scored with last
  std::optional<Best> best_;
  std::string best_checkpoint_;  // folder name in output_dir
  int64_t evaluations_since_best_ = 0;
};

}  // namespace

Json identity(const TrainConfig& config, int64_t max_steps) {
  Json json{{"max_steps", max_steps}};
  each_train_key(config, [&](const char* key, const auto& field, const KeyInfo& info) {
    if (info.identity) json[key] = field;
  });
  json["micro_batches_per_step"] = config.micro_batches();
  return json;
}

void settle_micro_batches(TrainConfig& config, ranks::Group& group) {
  std::string dir;
  if (group.first() && config.resume_from_checkpoint == "auto" && !config.overwrite_output_dir) {
    std::vector<std::string> passed_over;
    if (const auto newest = newest_checkpoint(config.output_dir, &passed_over)) {
      for (const std::string& why : passed_over) spdlog::warn("passed over: {}", why);
      dir = newest->path.string();
    }
  } else if (config.resume_from_checkpoint != "auto" && config.resume_from_checkpoint != "none") {
    dir = config.resume_from_checkpoint;
  }
  dir = group.from_first(dir);
  if (!dir.empty()) config.resume_from_checkpoint = dir;
  if (config.resume_from_checkpoint == "auto" && config.overwrite_output_dir) config.resume_from_checkpoint = "none";
  const fs::path state =
      fs::path(dir) / "trainer_state.json";  // the whole is read, and checked, by who goes on with it
  if (config.micro_batches_per_step == 0 && !dir.empty() && fs::exists(state)) {
    const std::string where = state.string();
    const Json saved = get<Json>(get<Json>(read_json(state), "moesaic", where), "config", where);
    if (saved.value("gradient_accumulation_steps", Json()) == config.gradient_accumulation_steps) {
      config.micro_batches_per_step =
          get_or<int64_t>(saved, "micro_batches_per_step", config.gradient_accumulation_steps, where);
    }
  }
  const int64_t usual = config.gradient_accumulation_steps * group.size();
  if (config.micro_batches_per_step == 0) config.micro_batches_per_step = usual;
  const int64_t all = config.micro_batches_per_step;
  MOESAIC_CHECK(group.size() <= all, UsageError,
                "got {} ranks and {} micro-batches a step, expected at most one rank each\nhint: more "
                "gradient_accumulation_steps or micro_batches_per_step, with a smaller per_device_train_batch_size",
                group.size(), all);
}

int64_t steps_of(const TrainConfig& config, int64_t epoch_size) {
  if (config.max_steps > 0) return config.max_steps;
  const int64_t per_step = config.per_device_train_batch_size * config.micro_batches();
  return static_cast<int64_t>(
      std::ceil(static_cast<double>(epoch_size) * config.num_train_epochs / static_cast<double>(per_step)));
}

void check_sizes(const TrainConfig& config) {
  constexpr int64_t kExamples = int64_t{1} << 16, kTokens = int64_t{1} << 26, kSteps = int64_t{1} << 40;
  std::vector<std::string> wrong;
  auto at_most = [&](const char* key, int64_t value, int64_t most) {
    if (value > most) wrong.push_back(fmt::format("{}: got {}, expected at most {}", key, value, most));
  };
  at_most("per_device_train_batch_size", config.per_device_train_batch_size, kExamples);
  at_most("gradient_accumulation_steps", config.gradient_accumulation_steps, kExamples);
  at_most("micro_batches_per_step", config.micro_batches_per_step, kExamples);
  at_most("max_batch_tokens", config.max_batch_tokens, kTokens);
  at_most("max_steps", config.max_steps, kSteps);
  at_most("warmup_steps", config.warmup_steps, kSteps);
  at_most("adafactor_initial_step", config.adafactor_initial_step, kSteps);
  if (!(config.num_train_epochs <= 1e6)) {
    wrong.push_back(fmt::format("num_train_epochs: got {}, expected at most 1000000", config.num_train_epochs));
  }
  MOESAIC_CHECK(wrong.empty(), UsageError, "run config: {}", fmt::join(wrong, "; "));
}

void check_config(const TrainConfig& config, int64_t epoch_size) {
  check_sizes(config);
  std::vector<std::string> wrong;
  auto require = [&](bool ok, const std::string& message) {
    if (!ok) wrong.push_back(message);
  };
  require(config.per_device_train_batch_size > 0, "per_device_train_batch_size must be at least 1");
  require(config.gradient_accumulation_steps > 0, "gradient_accumulation_steps must be at least 1");
  require(config.micro_batches_per_step >= 0, "micro_batches_per_step must not be negative");
  require(config.ddp_timeout > 0, "ddp_timeout must be at least 1");
  require(config.max_batch_tokens >= 0, "max_batch_tokens must not be negative");
  require(std::isfinite(config.learning_rate) && config.learning_rate >= 0, "learning_rate must not be negative");
  require(std::isfinite(config.router_learning_rate) && config.router_learning_rate >= 0,
          "router_learning_rate must not be negative");
  require(config.optim == "adamw" || config.optim == "adafactor",
          fmt::format("optim: got '{}', expected adamw or adafactor", config.optim));
  require(config.loss_normalization == "tokens" || config.loss_normalization == "sequences",
          fmt::format("loss_normalization: got '{}', expected tokens or sequences", config.loss_normalization));
  require(config.max_steps > 0 || (epoch_size > 0 && config.num_train_epochs > 0),
          "give max_steps, or num_train_epochs with data of known size");
  require(config.max_steps > 0 || config.max_batch_tokens == 0,
          "max_batch_tokens needs max_steps: how many steps an epoch has is not known before");
  require(config.warmup_ratio >= 0 && config.warmup_ratio <= 1, "warmup_ratio must lie in 0..1");
  try {
    schedule_factor(config.lr_scheduler_type, /*step=*/0, /*warmup_steps=*/0, /*max_steps=*/1);
  } catch (const UsageError& error) {
    wrong.emplace_back(error.what());
  }
  require(config.dropout_rate >= 0 && config.dropout_rate < 1,
          fmt::format("dropout_rate: got {}, expected 0 to below 1", config.dropout_rate));
  require(std::isfinite(config.z_loss_coef) && config.z_loss_coef >= 0, "z_loss_coef must not be negative");
  require(config.logging_steps > 0, "logging_steps must be at least 1");
  require(config.task_eval_steps >= 0, "eval.steps must not be negative");
  for (const std::string& target : config.report_to) {
    require(target == "jsonl" || target == "tensorboard" || target == "none",
            fmt::format("report_to: got '{}', expected jsonl, tensorboard or none", target));
  }
  require(config.early_stopping_patience >= 0, "early_stopping_patience must not be negative");
  const bool by_loss = is_loss(config.metric_for_best_model);
  const bool ends_with_best = config.early_stopping_patience > 0 || config.load_best_model_at_end;
  require(!ends_with_best || ((by_loss ? config.eval_steps : config.task_eval_steps) > 0 && config.save_steps > 0 &&
                              !config.output_dir.empty()),
          fmt::format("{} with metric_for_best_model {} needs {}, save_steps and output_dir: the best weights are a "
                      "checkpoint",
                      config.load_best_model_at_end ? "load_best_model_at_end" : "early_stopping_patience",
                      config.metric_for_best_model, by_loss ? "eval_steps" : "eval.steps"));
  MOESAIC_CHECK(wrong.empty(), UsageError, "run config: {}", fmt::join(wrong, "; "));
}

std::string TrainResult::stopping_reason() const {
  if (!best || (weights_of == steps && !stopped_early)) return "";
  const std::string holds =
      fmt::format("the folder holds the weights of step {}, where it was {:.4f}", weights_of, best->value);
  if (stopped_early) {
    return fmt::format("stopped at step {}: {} has not improved in {} evaluations; {}", steps, best->metric, patience,
                       holds);
  }
  return fmt::format("{} was best before the last step: {}", best->metric, holds);
}

std::vector<std::string> loss_names(const std::vector<EvalSet>& eval_sets) {
  std::vector<std::string> names;
  if (!eval_sets.empty()) names.emplace_back("eval_loss");
  if (eval_sets.size() < 2) return names;
  for (const EvalSet& set : eval_sets) names.push_back(fmt::format("eval_{}_loss", set.name));
  return names;
}

void check_metric(const TrainConfig& config, const std::vector<std::string>& known) {
  const std::string& metric = config.metric_for_best_model;
  const bool asked = metric != TrainConfig{}.metric_for_best_model || config.early_stopping_patience > 0 ||
                     config.load_best_model_at_end;
  MOESAIC_CHECK(!asked || std::find(known.begin(), known.end(), metric) != known.end(), UsageError,
                "metric_for_best_model: got '{}', expected {}", metric,
                known.empty() ? "data to evaluate: val_size, eval_dataset or eval.tasks"
                              : fmt::format("one of {}", fmt::join(known, ", ")));
}

void check_run(const TrainConfig& config, const models::LanguageModel& model, nn::Learner& learner) {
  MOESAIC_CHECK(config.dropout_rate == 0 || model.facts().has_dropout, UsageError,
                "dropout_rate: got {}, expected 0: a {} has no dropout of its own\nhint: lora_dropout acts in the "
                "adapter",
                config.dropout_rate, model.facts().model_type);
  const auto parameters = learner.parameters();
  const bool routed = std::any_of(parameters.begin(), parameters.end(), [](const nn::Parameter& parameter) {
    return parameter.kind == nn::Parameter::Kind::kRouter;
  });
  MOESAIC_CHECK(routed || (config.moe_aux_loss_coef == 0 && config.router_z_loss_coef == 0), UsageError,
                "moe_aux_loss_coef, router_z_loss_coef: got {} and {}, expected 0: no router is trained in this run",
                config.moe_aux_loss_coef, config.router_z_loss_coef);
}

std::vector<OptimizedTensor> optimized_tensors(nn::Learner& learner, const TrainConfig& config) {
  using Kind = nn::Parameter::Kind;
  std::vector<OptimizedTensor> tensors;
  std::set<void*> seen;
  for (const nn::Parameter& parameter : learner.parameters()) {
    // On the meta device no tensor has an address of its own.
    if (!parameter.tensor.is_meta() && !seen.insert(parameter.tensor.data_ptr()).second) continue;
    const bool own_rate = parameter.kind == Kind::kRouter && config.router_learning_rate > 0;
    const bool decays = parameter.kind == Kind::kWeight || parameter.kind == Kind::kMatrix;
    tensors.push_back({parameter.name, parameter.tensor, own_rate ? config.router_learning_rate : config.learning_rate,
                       decays ? config.weight_decay : 0.0, parameter.kind == Kind::kWeight});
  }
  return tensors;
}

double evaluate_loss(models::LanguageModel& model, const std::vector<data::Example>& examples, int64_t batch_size) {
  ranks::Group alone;
  return evaluate_loss(model, examples, batch_size, alone);
}

double evaluate_loss(models::LanguageModel& model, const std::vector<data::Example>& examples, int64_t batch_size,
                     ranks::Group& group) {
  torch::NoGradGuard no_grad;
  const torch::Device device = model.facts().device;
  const auto count = std::ssize(examples);
  auto of_batch = [&](int64_t b) -> Json {
    const std::vector<data::Example> part(examples.begin() + b * batch_size,
                                          examples.begin() + std::min(count, (b + 1) * batch_size));
    const data::Batch batch = data::collate(part, device);
    if (batch.num_targets() == 0) return {0.0, 0};
    nn::Pass pass;
    const torch::Tensor hidden = model.hidden(text_of(batch, part), pass);
    const auto ones = torch::ones({batch.num_targets()}, torch::dtype(torch::kFloat32).device(device));
    return {model.head().loss(hidden, batch.labels, ones).item<double>(), batch.num_targets()};
  };
  double sum = 0;
  int64_t targets = 0;
  for (const Json& batch : ranks::deal(group, (count + batch_size - 1) / batch_size, of_batch)) {
    sum += batch[0].get<double>();
    targets += batch[1].get<int64_t>();
  }
  MOESAIC_CHECK(targets > 0, DataError, "evaluation: none of the {} examples has a token to score", examples.size());
  return sum / static_cast<double>(targets);
}

void check_start(models::LanguageModel& model, nn::Learner& learner, data::ExampleStream& stream,
                 const TrainConfig& config, int64_t epoch_size) {
  check_config(config, epoch_size);
  check_run(config, model, learner);
  const std::vector<EvalSet> none;
  const TrainHooks hooks;
  Run(model, learner, stream, none, config, epoch_size, hooks).check_start();
}

TrainResult train(models::LanguageModel& model, nn::Learner& learner, data::ExampleStream& stream,
                  const std::vector<EvalSet>& eval_sets, const TrainConfig& config, int64_t epoch_size,
                  const TrainHooks& hooks) {
  check_config(config, epoch_size);
  check_run(config, model, learner);
  hooks.group->meet();
  TrainConfig settled = config;
  settle_micro_batches(settled, *hooks.group);
  return Run(model, learner, stream, eval_sets, settled, epoch_size, hooks).execute();
}

}  // namespace moesaic::train
