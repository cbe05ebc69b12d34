// A run file: every key of `moesaic train`, its default and what it becomes.
#pragma once
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/data/dataset.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

/// A run, parsed.
struct RunConfig {
  std::string model_name_or_path;
  std::string init = "pretrained";   // pretrained | random (from config.json alone)
  std::string tokenizer;             // of a model from nothing: folder or file; "" = the model's own, or trained
  int64_t tokenizer_vocab_size = 0;  // above 0: trained on the run's texts
  std::string finetuning_type;       // lora | ia3 | mov | molora | calm | full
  std::string adapter_name_or_path;  // start from this adapter's numbers
  adapters::AdapterConfig adapter;   // targets are empty when `target_preset` names them
  std::string target_preset;         // reference | all-linear | ""
  Json dataset, eval_dataset;        // as data::resolve_datasets takes them
  std::string dataset_dir;
  double val_size = 0;
  std::string mixture_rule;
  data::RenderOptions render;
  std::string device, dtype;
  TrainConfig train;
  std::vector<std::string> eval_tasks;  // task files scored while training, train.task_eval_steps apart
  int64_t eval_limit = 0;               // questions of each; 0 = all
  Json resolved;                        // every key with its value: what run.yaml of the output folder holds
};

/// Every key of a run with its default, by LLaMA-Factory's names where it has one.
const Json& run_defaults();

/// Parses a run. Aliases of other tools (base_model, lora_r, micro_batch_size, ...) are accepted with a note in the
/// log. Throws one UsageError for all unknown keys, naming the nearest, and UsageError or ConfigError for values that
/// can't be.
RunConfig parse_run_config(const Json& json, const std::string& where);

}  // namespace moesaic::train
