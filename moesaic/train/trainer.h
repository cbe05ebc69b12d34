// The training loop: batches in, optimiser steps out, logs and checkpoints beside.
#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/data/example.h"
#include "moesaic/models/language_model.h"
#include "moesaic/nn/learner.h"
#include "moesaic/ranks/group.h"
#include "moesaic/train/optimizer.h"

namespace moesaic::train {

/// How a run trains (interfaces: LLaMA-Factory's names). train_keys.h says what each key means.
struct TrainConfig {
  std::filesystem::path output_dir;         // empty = write nothing
  bool overwrite_output_dir = false;        // delete an earlier run's checkpoints there
  int64_t per_device_train_batch_size = 8;  // examples per micro-batch
  int64_t max_batch_tokens = 0;             // 0 = off; else micro-batches are filled up to so many tokens instead
  int64_t gradient_accumulation_steps = 1;  // micro-batches of a step that a rank makes
  int64_t micro_batches_per_step = 0;       // of all ranks together; 0 = gradient_accumulation_steps * ranks
  int64_t ddp_timeout = 1800;               // seconds that a rank waits for the others
  double learning_rate = 3e-4;              // peak
  double router_learning_rate = 0;          // 0 = learning_rate
  std::string optim = "adamw";              // adamw | adafactor
  double weight_decay = 0.0;                // decoupled
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  int64_t adafactor_initial_step = 0;               // updates made before the first
  std::string lr_scheduler_type = "linear";         // constant | linear | cosine | inverse_sqrt
  double warmup_ratio = 0.0;                        // share of the steps
  int64_t warmup_steps = 0;                         // steps; wins over warmup_ratio
  double max_grad_norm = 1.0;                       // 0 = off
  int64_t max_steps = -1;                           // -1: from num_train_epochs
  double num_train_epochs = 3;                      // when max_steps is -1
  bool gradient_checkpointing = false;              // blocks run again in the backward pass
  std::string loss_normalization = "tokens";        // tokens | sequences
  double moe_aux_loss_coef = 0.0;                   // of the balance loss
  double router_z_loss_coef = 0.0;                  // of the z-loss
  double z_loss_coef = 0.0;                         // of the logits' z-loss
  double dropout_rate = 0.0;                        // at the model's own sites
  int64_t logging_steps = 10;                       // steps between log lines
  int64_t save_steps = 500;                         // steps between checkpoints; 0 = none
  int64_t eval_steps = 0;                           // steps between evaluations; 0 = none
  bool eval_on_start = false;                       // evaluate before the first step, too
  int64_t save_total_limit = 2;                     // checkpoints kept beside the best; 0 = all
  int64_t task_eval_steps = 0;                      // steps between task evaluations; 0 = at the end only
  std::string metric_for_best_model = "eval_loss";  // eval_loss | eval_<data set>_loss | eval/<task>/<metric>
  int64_t early_stopping_patience = 0;              // evaluations without improvement; 0 = off
  bool load_best_model_at_end = false;          // end with the weights of the best evaluation, as early stopping does
  std::string resume_from_checkpoint = "none";  // auto | none | DIR
  std::vector<std::string> report_to{"jsonl"};  // jsonl, tensorboard
  uint64_t seed = 42;                           // of dropout, jitter and everything else random in training
  bool deterministic = false;  // PyTorch's deterministic algorithms only; on the CPU runs repeat themselves either way

  /// Of a step, of all ranks together; of one rank where that is not settled.
  int64_t micro_batches() const {
    return micro_batches_per_step > 0 ? micro_batches_per_step : gradient_accumulation_steps;
  }
};

/// What one step did.
struct StepLog {
  int64_t step, max_steps;
  double loss;  // of this step; the logs hold the mean since the last log
  double learning_rate, grad_norm;
  double tokens_per_second;
  double aux_loss;  // what the routers added to the loss, coefficients included
  int64_t tokens;   // seen so far, prompts included
  double seconds, eta;
};

/// Held-out examples of one data set.
struct EvalSet {
  std::string name;  // no two alike
  std::vector<data::Example> examples;
};

/// Settles micro_batches_per_step: as it is given; else that of the checkpoint which the run goes on with, where that
/// had as many gradient_accumulation_steps; else gradient_accumulation_steps * ranks. Names the checkpoint, so that all
/// ranks go on with the same one. Throws UsageError for more ranks than micro-batches.
void settle_micro_batches(TrainConfig& config, ranks::Group& group);
/// Steps of a run whose epochs have `epoch_size` examples.
int64_t steps_of(const TrainConfig& config, int64_t epoch_size);
/// Throws UsageError naming every size of `config` that no machine has room or time for.
void check_sizes(const TrainConfig& config);
/// Throws UsageError with everything about `config` that can't be run, in one message. `epoch_size` as train() takes
/// it.
void check_config(const TrainConfig& config, int64_t epoch_size);
/// Throws UsageError when the config asks for what this model or learner hasn't: losses of routers where none is
/// trained, dropout where the model has no place for it.
void check_run(const TrainConfig& config, const models::LanguageModel& model, nn::Learner& learner);

/// Names of what was measured, and their values.
using Scores = std::vector<std::pair<std::string, double>>;
/// Scores tasks with the weights of this moment: {"rte/acc", 0.61}.
using TaskEvaluation = std::function<Scores()>;

/// What an evaluation of these measures: "eval_loss"; of several sets "eval_<name>_loss" each, too.
std::vector<std::string> loss_names(const std::vector<EvalSet>& eval_sets);
/// Throws UsageError when the run is judged by something that none of its evaluations measures. known: loss_names() and
/// the tasks' "eval/<task>/<metric>".
void check_metric(const TrainConfig& config, const std::vector<std::string>& known);

/// What a run's surroundings hear of it, and ask of it.
struct TrainHooks {
  std::function<void(const StepLog&)> on_log{};  // after every step
  /// When given, called before the first step, every task_eval_steps steps and after the last one; the scores go to the
  /// console, train_log.jsonl, trainer_state.json and TensorBoard as "eval/<name>".
  TaskEvaluation evaluate_tasks{};
  std::function<bool()> stop{};  // asked after every step; true: the step is saved and the run ends `interrupted`
  std::function<void(const Json& row)> on_row{};  // gets every row of train_log.jsonl and router_stats.jsonl
  /// The ranks that train together; rank 0 alone writes, logs and calls on_log and on_row.
  std::shared_ptr<ranks::Group> group = std::make_shared<ranks::Group>();
};

/// The best evaluation of a run.
struct Best {
  std::string metric;  // metric_for_best_model
  double value;
  int64_t step;
};

struct TrainResult {
  int64_t steps;
  double train_loss;         // mean over the steps of this call
  std::optional<Best> best;  // nullopt: nothing was evaluated
  bool interrupted = false;
  bool stopped_early = false;
  int64_t patience = 0;    // evaluations without improvement that end a run; 0 = off
  int64_t weights_of = 0;  // the step whose weights the folder holds: best->step where these are wanted, else the last
  double seconds = 0;
  int64_t tokens = 0;

  /// When and why the run stopped before its last step, and whose weights the folder holds; "" where that needs no
  /// word.
  std::string stopping_reason() const;
};

/// Trains `learner`, a part of `model`, on `stream`.
///
///   loss of a step = sum_t w_t CE_t + c_aux mean_sites(balance) + c_z mean_sites(z)
///   tokens: w_t = 1 / targets of the whole step;  sequences: w_t = 1 / (targets of its sequence * sequences of the
///   step)
///
/// All micro-batches of a step are read before the first is run, so N x 1 examples equal 1 x N; a last partial step is
/// normalised by its own targets. (A balance loss is the token-weighted mean of the micro-batches'.) The routers'
/// losses are those of the routers that are trained, in any part of the model.
///
/// `eval_sets` may be empty; each is scored by itself ("eval_<name>_loss") where there are several, and all together by
/// the mean over their targets ("eval_loss"). `epoch_size`, examples per epoch, turns epochs into steps when max_steps
/// is -1. An evaluation that improves metric_for_best_model (a loss falls, a score rises) is saved as a checkpoint that
/// rotation keeps; with early stopping or load_best_model_at_end the run ends with the best weights, else with the
/// last.
///
/// Writes into output_dir: checkpoint-N/, train_log.jsonl, router_stats.jsonl, trainer_state.json, TensorBoard event
/// files (tensorboard/) and at the end what the learner saves. A checkpoint of the last step is always made when
/// save_steps > 0.
///
/// Throws UsageError for a config that can't be run, DataError when loss or gradient is not finite (naming step and
/// block; nothing is saved), when a checkpoint does not fit, when a rank is gone or has other weights than another.
TrainResult train(models::LanguageModel& model, nn::Learner& learner, data::ExampleStream& stream,
                  const std::vector<EvalSet>& eval_sets, const TrainConfig& config, int64_t epoch_size,
                  const TrainHooks& hooks = {});

/// Throws what train() would throw before its first step, for a model that may be on the meta device: takes the
/// checkpoint that the run would go on with. Writes nothing.
void check_start(models::LanguageModel& model, nn::Learner& learner, data::ExampleStream& stream,
                 const TrainConfig& config, int64_t epoch_size);

/// Mean cross entropy per target over `examples`, in nats; each rank of `group` runs its part of the batches.
double evaluate_loss(models::LanguageModel& model, const std::vector<data::Example>& examples, int64_t batch_size,
                     ranks::Group& group);
double evaluate_loss(models::LanguageModel& model, const std::vector<data::Example>& examples, int64_t batch_size);

/// The learner's tensors with their learning rates and weight decays: routers have their own rate and no decay, vectors
/// ((IA)^3, MoV), norms and biases no decay. Tensors that share their numbers (tied weights) stand once.
std::vector<OptimizedTensor> optimized_tensors(nn::Learner& learner, const TrainConfig& config);

}  // namespace moesaic::train
