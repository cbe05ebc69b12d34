// The training loop: batches in, optimiser steps out, logs and checkpoints beside.
#pragma once
#include <filesystem>
#include <functional>
#include <memory>

#include "moesaic/adapters/adapter.h"
#include "moesaic/compose/composition.h"
#include "moesaic/data/example.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/train/optimizer.h"

namespace moesaic::train {

/// The training keys of a run (interfaces: LLaMA-Factory's names).
struct TrainConfig {
  std::filesystem::path output_dir;         // empty = write nothing
  bool overwrite_output_dir = false;        // delete an earlier run's checkpoints there
  int64_t per_device_train_batch_size = 8;  // examples per micro-batch
  int64_t max_batch_tokens = 0;             // 0 = off; else micro-batches are filled up to so many tokens instead
  int64_t gradient_accumulation_steps = 1;
  double learning_rate = 3e-4;
  double router_learning_rate = 0;  // 0 = learning_rate
  std::string optim = "adamw";      // adamw | adafactor
  double weight_decay = 0.0, adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  int64_t adafactor_initial_step = 0;
  std::string lr_scheduler_type = "linear";  // constant | linear | cosine | inverse_sqrt
  double warmup_ratio = 0.0;
  int64_t warmup_steps = 0;
  double max_grad_norm = 1.0;  // 0 = off
  int64_t max_steps = -1;
  double num_train_epochs = 3;
  bool gradient_checkpointing = false;
  std::string loss_normalization = "tokens";  // tokens | sequences
  double moe_aux_loss_coef = 0.0, router_z_loss_coef = 0.0;
  int64_t logging_steps = 10, save_steps = 500, eval_steps = 0, save_total_limit = 2;
  int64_t task_eval_steps = 0;                  // steps between task evaluations; 0 = at the end only
  int64_t early_stopping_patience = 0;          // evaluations without improvement; 0 = off
  std::string resume_from_checkpoint = "none";  // auto | none | DIR
  std::vector<std::string> report_to{"jsonl"};  // jsonl, tensorboard
  bool train_adapters = false;                  // of a composition's models, with the connections
  double state_cache_gib = 2;                   // GiB of a composition's frozen states kept between epochs; 0 = off
  std::string state_cache_dir;                  // "" = kept in memory; else a folder, which outlives the run
  uint64_t seed = 42;
  bool deterministic = false;  // PyTorch's deterministic algorithms only; on the CPU runs repeat themselves either way
};

struct StepLog {
  int64_t step, max_steps;
  double loss;  // of this step; the logs hold the mean since the last log
  double learning_rate, grad_norm;
  double tokens_per_second;
  double aux_loss;  // what the routers added to the loss, coefficients included
  int64_t tokens;   // seen so far, prompts included
  double seconds, eta;
};

/// Throws UsageError with everything about `config` that can't be run, in one message. `epoch_size` as train() takes
/// it.
void check_config(const TrainConfig& config, int64_t epoch_size);

/// Scores tasks with the weights of this moment: {"rte/acc", 0.61}. Must not draw from the global random generators.
using TaskEvaluation = std::function<std::vector<std::pair<std::string, double>>()>;

struct TrainResult {
  int64_t steps;
  double train_loss;  // mean over the steps of this call
  std::optional<double> best_eval_loss;
  bool interrupted = false;
  double seconds = 0;
  int64_t tokens = 0;
};

/// Trains `adapter` (or, when it is null, every weight of `model`: full fine-tuning) on `stream`.
///
///   loss of a step = sum_t w_t CE_t + c_aux mean_sites(balance) + c_z mean_sites(z)
///   tokens: w_t = 1 / targets of the whole step;  sequences: w_t = 1 / (targets of its sequence * sequences of the
///   step)
///
/// All micro-batches of a step are read before the first is run, so N x 1 examples equal 1 x N; a last partial step is
/// normalised by its own targets. (A balance loss is the token-weighted mean of the micro-batches'.)
///
/// `eval_examples` may be empty. `on_log` is called after every step (progress bar). `epoch_size`, examples per epoch,
/// turns epochs into steps when max_steps is -1. An evaluation that improves is saved as a checkpoint that rotation
/// keeps; with early stopping the run ends with the best weights, else with the last.
///
/// `evaluate_tasks`, when given, is called every task_eval_steps steps and after the last one; its scores go to the
/// console, train_log.jsonl, trainer_state.json and TensorBoard as "eval/<name>".
///
/// Writes into output_dir: checkpoint-N/, train_log.jsonl, router_stats.jsonl, trainer_state.json, TensorBoard event
/// files (tensorboard/) and at the end the adapter. A checkpoint of the last step is always made when save_steps > 0.
///
/// On SIGINT or SIGTERM the step is finished and saved, and the result says `interrupted`; a second signal ends the
/// process. Throws UsageError for a config that can't be run, DataError when loss or gradient is not finite (naming
/// step and layer; nothing is saved) or when a checkpoint does not fit.
TrainResult train(models::CausalLM& model, adapters::Adapter* adapter, data::ExampleStream& stream,
                  const std::vector<data::Example>& eval_examples, const TrainConfig& config, int64_t epoch_size,
                  const std::function<void(const StepLog&)>& on_log = nullptr,
                  const TaskEvaluation& evaluate_tasks = nullptr);

/// The same for the connections of a composition whose models were opened from files; an answer's beginning is a border
/// (compose::Borders). Checkpoints and output_dir are composition folders. Frozen states are kept (state_cache_*) when
/// the run reads its data more than once, or when they have a folder; the losses are the same without. Throws
/// UsageError for a mask that shows the future.
TrainResult train(compose::Composition& composition, data::ExampleStream& stream,
                  const std::vector<data::Example>& eval_examples, const TrainConfig& config, int64_t epoch_size,
                  const std::function<void(const StepLog&)>& on_log = nullptr,
                  const TaskEvaluation& evaluate_tasks = nullptr);

/// Mean cross entropy per target over `examples`, in nats.
double evaluate_loss(models::CausalLM& model, const adapters::Adapter* adapter,
                     const std::vector<data::Example>& examples, int64_t batch_size);

double evaluate_loss(compose::Composition& composition, const std::vector<data::Example>& examples, int64_t batch_size);

/// The tensors a run trains, with their learning rates and weight decays: routers have their own rate and no decay,
/// vectors ((IA)^3, MoV), norms and biases no decay. `adapter` null: every parameter of `model`.
std::vector<OptimizedTensor> trainable_tensors(models::CausalLM& model, adapters::Adapter* adapter,
                                               const TrainConfig& config);
std::vector<OptimizedTensor> trainable_tensors(compose::Composition& composition, const TrainConfig& config);

}  // namespace moesaic::train
