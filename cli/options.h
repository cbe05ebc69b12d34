// Flags that several verbs share.
#pragma once
#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/generate/generate.h"
#include "moesaic/run/evaluation.h"

namespace moesaic::cli {

/// The words that name a model.
struct ModelOptions {
  std::string named;                  // an adapter's folder, which knows its base; or what --model takes
  std::string model;                  // folder with config.json, a .gguf file, or a composition's folder
  std::vector<std::string> adapters;  // [NAME=]DIR[:scale]
  std::string quantize = "none";      // none | int8
};
void add_model_options(CLI::App& app, ModelOptions& options);

/// What these words name, ready to run.
struct Loaded : run::Opened {
  run::ModelReference from;
  NumberFormat format;

  run::Examinee examinee() const { return {*this, from}; }
  /// "float32 on cpu (asked for)".
  std::string computes_in() const;
};
Loaded load(const ModelOptions& options, const CommonOptions& common, bool needs_tokenizer = true);

/// The model and the one adapter, "" for none, of a verb that writes them as one model. Throws UsageError for more, and
/// for a scale.
std::pair<std::string, std::string> single_adapter(const run::ModelReference& reference);

/// A bar for each task, one after the other.
run::TaskProgress task_bars();

/// --tasks, --limit and how questions are put.
void add_task_options(CLI::App& app, std::vector<std::string>& tasks, eval::TaskOptions& task, run::AskOptions& ask);

/// The flags that say how tokens are chosen.
void add_sampling_options(CLI::App& app, generate::SamplingOptions& options);

}  // namespace moesaic::cli
