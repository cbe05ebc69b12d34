// Flags that several verbs share.
#pragma once
#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/generate/generate.h"
#include "moesaic/run/open.h"

namespace moesaic::cli {

/// The flags that name a model.
struct ModelOptions {
  std::string model;                  // folder with config.json, a .gguf file, or a composition's folder
  std::vector<std::string> adapters;  // [NAME=]DIR[:scale]
  std::string quantize = "none";      // none | int8
};
void add_model_options(CLI::App& app, ModelOptions& options);

/// What these flags name, ready to run.
struct Loaded : run::Opened {
  NumberFormat format;

  /// The same as eval/ wants it.
  eval::EvalModel for_evaluation() const { return {*model, *tokenizer, chat_template.get()}; }
  /// "float32 on cpu (asked for)".
  std::string computes_in() const;
};
Loaded load(const ModelOptions& options, const CommonOptions& common, bool needs_tokenizer = true);

/// --tasks, --limit and --apply_chat_template.
void add_task_options(CLI::App& app, std::vector<std::string>& tasks, eval::TaskOptions& task,
                      eval::EvalOptions& options);

/// The flags that say how tokens are chosen.
void add_sampling_options(CLI::App& app, generate::SamplingOptions& options);

}  // namespace moesaic::cli
