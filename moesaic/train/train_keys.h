// The training keys of a run, each written once: its name, its field, what it means, and whether a resumed run must
// keep it to be the same run.
#pragma once
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// What is said of a run's key. `help` is Markdown, as docs/config.md has it.
struct KeyInfo {
  const char* section;  // of docs/config.md
  const char* help;
  bool identity = false;  // a resumed run with another value is another run
};

/// visit(key, field, KeyInfo) for every key that a field of TrainConfig takes as it stands.
template <class Config, class Visit>
void each_train_key(Config& train, Visit visit) {
  constexpr const char *kModel = "Model and method", *kSteps = "Steps", *kOutput = "Output";
  visit("moe_aux_loss_coef", train.moe_aux_loss_coef,
        KeyInfo{kModel, "weight of the balance loss of the routers that are trained; needs one", true});
  visit("router_z_loss_coef", train.router_z_loss_coef, KeyInfo{kModel, "weight of their z-loss", true});
  visit("dropout_rate", train.dropout_rate,
        KeyInfo{kModel,
                "of the base model at its own sites while training, drawn once a sequence; T5 was trained with "
                "0.1. Only T5's kind has such sites",
                true});
  visit("z_loss_coef", train.z_loss_coef,
        KeyInfo{kSteps, "weight of the logits' z-loss, log(Z)^2 of each target token; T5 was trained with 1e-4", true});
  visit("per_device_train_batch_size", train.per_device_train_batch_size,
        KeyInfo{kSteps, "examples of a micro-batch", true});
  visit("max_batch_tokens", train.max_batch_tokens,
        KeyInfo{kSteps, "fill micro-batches up to so many tokens instead; 0 is off", true});
  visit("gradient_accumulation_steps", train.gradient_accumulation_steps,
        KeyInfo{kSteps, "micro-batches of a step that a rank makes", true});
  visit("micro_batches_per_step", train.micro_batches_per_step,
        KeyInfo{kSteps,
                "micro-batches of a step that all ranks make together: the run is then the same for every number of "
                "ranks; 0 is `gradient_accumulation_steps` times the ranks, as elsewhere"});
  visit("ddp_timeout", train.ddp_timeout,
        KeyInfo{kSteps, "seconds that a rank waits for the others before it gives up"});
  visit("loss_normalization", train.loss_normalization,
        KeyInfo{kSteps,
                "`tokens`: mean over all target tokens of the step; `sequences`: mean over examples of their means",
                true});
  visit("max_steps", train.max_steps, KeyInfo{kSteps, "steps; -1 follows from `num_train_epochs`"});
  visit("num_train_epochs", train.num_train_epochs, KeyInfo{kSteps, "epochs, when `max_steps` is -1"});
  visit("learning_rate", train.learning_rate, KeyInfo{kSteps, "peak", true});
  visit("router_learning_rate", train.router_learning_rate, KeyInfo{kSteps, "of routers; 0 is `learning_rate`", true});
  visit("lr_scheduler_type", train.lr_scheduler_type,
        KeyInfo{kSteps, "`constant`, `linear`, `cosine`, `inverse_sqrt`", true});
  visit("warmup_ratio", train.warmup_ratio, KeyInfo{kSteps, "share of the steps", true});
  visit("warmup_steps", train.warmup_steps, KeyInfo{kSteps, "steps; wins over `warmup_ratio`", true});
  visit("optim", train.optim, KeyInfo{kSteps, "`adamw`, `adafactor`", true});
  visit("weight_decay", train.weight_decay,
        KeyInfo{kSteps, "decoupled; not of routers, vectors, norms and biases", true});
  visit("adam_beta1", train.adam_beta1, KeyInfo{kSteps, "decay of the mean of the gradients", true});
  visit("adam_beta2", train.adam_beta2, KeyInfo{kSteps, "decay of the mean of their squares", true});
  visit("adam_epsilon", train.adam_epsilon, KeyInfo{kSteps, "added to the root of that mean", true});
  visit("adafactor_initial_step", train.adafactor_initial_step,
        KeyInfo{kSteps, "updates before the first; T5's pretraining made 1.1 million", true});
  visit("max_grad_norm", train.max_grad_norm, KeyInfo{kSteps, "clip all gradients together; 0 is off", true});
  visit("gradient_checkpointing", train.gradient_checkpointing,
        KeyInfo{kSteps, "compute blocks again in the backward pass instead of keeping their activations"});
  visit("seed", train.seed, KeyInfo{kSteps, "of everything random", true});
  visit("deterministic", train.deterministic,
        KeyInfo{kSteps,
                "run deterministic algorithms only, and stop with an error where there is none. On the CPU a run "
                "repeats itself either way; on CUDA it costs speed"});
  visit("overwrite_output_dir", train.overwrite_output_dir,
        KeyInfo{kOutput, "delete an earlier run's checkpoints there"});
  visit("resume_from_checkpoint", train.resume_from_checkpoint,
        KeyInfo{kOutput, "`auto`: the newest complete checkpoint; or a checkpoint folder"});
  visit("logging_steps", train.logging_steps, KeyInfo{kOutput, "steps between log lines"});
  visit("save_steps", train.save_steps, KeyInfo{kOutput, "steps between checkpoints; 0 is none"});
  visit("save_total_limit", train.save_total_limit, KeyInfo{kOutput, "checkpoints kept, beside the best; 0 keeps all"});
  visit("eval_steps", train.eval_steps, KeyInfo{kOutput, "steps between evaluations; 0 is none"});
  visit("eval_on_start", train.eval_on_start,
        KeyInfo{kOutput, "evaluate before the first step, too: what the frozen model's losses are"});
  visit("metric_for_best_model", train.metric_for_best_model,
        KeyInfo{kOutput,
                "what an evaluation is judged by: `eval_loss`, `eval_<data set>_loss`, or a task's score, "
                "`eval/<task>/<metric>`, which is to rise",
                true});
  visit("early_stopping_patience", train.early_stopping_patience,
        KeyInfo{kOutput, "stop after so many evaluations without improvement, with the best weights; 0 is off"});
  visit("load_best_model_at_end", train.load_best_model_at_end,
        KeyInfo{kOutput, "end with the weights of the best evaluation in any case"});
}

/// What must not differ for a resumed run to be the same run; max_steps as it was worked out.
Json identity(const TrainConfig& config, int64_t max_steps);

}  // namespace moesaic::train
