// A run file: every key of `moesaic train`, its default, what it means and what it becomes.
#pragma once
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/json.h"
#include "moesaic/data/dataset.h"
#include "moesaic/train/train_keys.h"

namespace moesaic::run {

/// A run, parsed.
struct RunConfig {
  std::string model_name_or_path;          // folder or .gguf file
  std::string init = "pretrained";         // pretrained | random (from config.json alone)
  std::string tokenizer;                   // of a model from nothing: folder or file; "" = the model's own, or trained
  int64_t tokenizer_vocab_size = 0;        // above 0: trained on the run's texts
  std::string finetuning_type = "molora";  // what is trained: a name of subject.h's table
  std::string adapter_name_or_path;        // start from this adapter's numbers
  std::vector<std::string> adapters;       // `mix`: folders of the LoRAs that are its experts
  adapters::AdapterConfig adapter;         // targets are empty when `target_preset` names them
  std::string target_preset;               // reference | all-linear | ""
  Json dataset, eval_dataset;              // as data::resolve_datasets takes them
  std::string dataset_dir;                 // where names of datasets are looked up
  double val_size = 0;                     // share (below 1) or number of rows held out
  int64_t max_samples = 0;                 // rows of every data set and split at most; 0 = all
  bool pretraining = false;                // the texts of the prompt column are learnt whole
  bool eval_each_epoch = false;            // instead of train.eval_steps
  bool save_each_epoch = false;            // instead of train.save_steps
  std::string mixture_rule;                // how datasets are weighed
  data::RenderOptions render;              // how rows become tokens
  std::string device, dtype;               // as parse_device, number_format
  train::TrainConfig train;                // the loop
  bool train_adapters = false;             // of a composition's models, with the connections
  double state_cache_gib = 2;              // GiB of a composition's frozen states kept between epochs; 0 = off
  std::string state_cache_dir;             // "" = kept in memory; else a folder, which outlives the run
  std::vector<std::string> eval_tasks;     // task files scored while training, train.task_eval_steps apart
  int64_t eval_limit = 0;                  // questions of each; 0 = all
  int64_t eval_max_gen_toks = 128;         // of an answer to them
  OrderedJson resolved;                    // every key with its value: what run.yaml of the output folder holds
};

/// A key as docs/config.md tells of it.
struct RunKey {
  std::string name;  // "router.top_k"
  Json value;        // its default
  train::KeyInfo info;
};
/// Every key, by LLaMA-Factory's names where it has one.
const std::vector<RunKey>& run_keys();
/// The tables of docs/config.md.
std::string run_keys_markdown();

/// A run file with `overrides` (key=value) in it; of two names of one key the override's wins. Throws what read_yaml
/// and apply_overrides throw.
OrderedJson read_run(const std::filesystem::path& file, const std::vector<std::string>& overrides = {});

/// Parses a run. Aliases of other tools (base_model, lora_r, micro_batch_size, ...) and keys of LLaMA-Factory without a
/// meaning here are accepted with a note in the log. Throws one UsageError with everything that is wrong: unknown keys,
/// each with the nearest, types, values.
RunConfig parse_run_config(const OrderedJson& json, const std::string& where);

}  // namespace moesaic::run
