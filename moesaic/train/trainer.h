// The training loop: batches in, optimiser steps out, logs and checkpoints beside.
#pragma once
#include <filesystem>
#include <functional>
#include <memory>

#include "moesaic/adapters/adapter.h"
#include "moesaic/data/example.h"
#include "moesaic/models/causal_lm.h"

namespace moesaic::train {

/// The training keys of a run (interfaces: LLaMA-Factory's names).
struct TrainConfig {
  std::filesystem::path output_dir;
  int64_t per_device_train_batch_size = 8;      // examples per micro-batch
  int64_t max_batch_tokens = 0;                 // 0 = off; else micro-batches are filled up to so many tokens
  int64_t gradient_accumulation_steps = 1;
  double learning_rate = 3e-4;
  double router_learning_rate = 0;              // 0 = learning_rate
  std::string optim = "adamw";                  // adamw | adafactor
  double weight_decay = 0.0, adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  int64_t adafactor_initial_step = 0;
  std::string lr_scheduler_type = "linear";     // constant | linear | cosine | inverse_sqrt
  double warmup_ratio = 0.0;
  int64_t warmup_steps = 0;
  double max_grad_norm = 1.0;                   // 0 = off
  int64_t max_steps = -1;
  double num_train_epochs = 3;
  bool gradient_checkpointing = false;
  std::string loss_normalization = "tokens";    // tokens | sequences
  double moe_aux_loss_coef = 0.0, router_z_loss_coef = 0.0;
  int64_t logging_steps = 10, save_steps = 500, eval_steps = 0, save_total_limit = 2;
  int64_t early_stopping_patience = 0;          // evaluations without improvement; 0 = off
  std::string resume_from_checkpoint = "none";  // auto | none | DIR
  std::vector<std::string> report_to{"jsonl"};  // jsonl, tensorboard
  uint64_t seed = 42;
};

struct StepLog {
  int64_t step, max_steps;
  double loss, learning_rate, grad_norm, tokens_per_second, aux_loss;
  int64_t tokens;         // tokens seen so far, prompts included
  double seconds, eta;
};

struct TrainResult {
  int64_t steps;
  double train_loss;      // mean over the steps of this call
  std::optional<double> best_eval_loss;
  bool interrupted = false;
  double seconds = 0;
  int64_t tokens = 0;
};

/// Trains `adapter` (or, when it is null, every weight of `model`: full fine-tuning) on `stream`.
/// `eval_examples` may be empty. `on_log` is called every logging_steps (progress bar). `epoch_size` turns epochs into
/// steps when max_steps is -1.
TrainResult train(models::CausalLM& model, adapters::Adapter* adapter, data::ExampleStream& stream,
                  const std::vector<data::Example>& eval_examples, const TrainConfig& config, int64_t epoch_size,
                  const std::function<void(const StepLog&)>& on_log = nullptr);

}  // namespace moesaic::train
