// What most verbs begin with: a model, its tokenizer and its adapters from --model, --adapter and --quantize; and the
// flags of sampling.
#pragma once
#include "cli/command.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/compose/composition.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/generate/generate.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::cli {

/// The flags that name a model.
struct ModelOptions {
  std::string model;                  // folder with config.json, a .gguf file, or a composition's folder
  std::vector<std::string> adapters;  // [NAME=]DIR[:scale]
  std::string quantize = "none";      // none | int8
};

void add_model_options(CLI::App& app, ModelOptions& options);

/// One --adapter flag taken apart.
struct AdapterFlag {
  std::string name;  // NAME, or the folder's own name
  std::filesystem::path dir;
  double scale = 1.0;
};
/// Throws UsageError when the folder does not exist or the scale is no number.
AdapterFlag parse_adapter_flag(const std::string& flag);

/// Ids that end an answer: those of generation_config.json, of the model's config and of the tokenizer, if any.
std::vector<int64_t> eos_ids(const models::CausalLM& model, const Json& generation_config,
                             const tokenizer::Tokenizer* tokenizer);

/// A model ready to run. The adapters are destroyed first: they detach from the model's sites.
struct LoadedModel {
  std::shared_ptr<formats::Checkpoint> checkpoint;
  std::shared_ptr<models::CausalLM> model;
  std::shared_ptr<compose::Composition> composition;  // nullptr for a single model; `model` is then its anchor
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
  std::shared_ptr<tokenizer::ChatTemplate> chat_template;  // nullptr when the model has none
  std::vector<std::string> adapter_names;
  std::vector<std::unique_ptr<adapters::Adapter>> adapters;

  std::vector<int64_t> eos_ids() const {
    return cli::eos_ids(*model, checkpoint->generation_config(), tokenizer.get());
  }
  /// True when a router reads a sentence embedding.
  bool routes_by_sentence() const;
  /// Sentence embeddings [B, d_e] for `prompts`, made by the frozen model; undefined when no router reads them.
  /// Throws UsageError when the adapter was trained on a column's embeddings.
  torch::Tensor sentence_of(const std::vector<std::vector<int64_t>>& prompts) const;
  /// The same as eval/ wants it. Throws UsageError when adapters want sentence vectors of different sources.
  eval::EvalModel for_evaluation() const;
};

/// --tasks, --limit and --apply_chat_template.
void add_task_options(CLI::App& app, std::vector<std::string>& tasks, eval::TaskOptions& task,
                      eval::EvalOptions& options);

/// The flags that say how tokens are chosen.
void add_sampling_options(CLI::App& app, generate::SamplingOptions& options);

/// What a verb can do with what it loads.
struct LoadNeeds {
  bool tokenizer = true;     // else a model that comes without one is fine and LoadedModel::tokenizer is nullptr
  bool composition = false;  // whether it can run a composition; else one is refused
};

/// Loads everything that `options` names; adapters go into a composition's anchor. Throws UsageError, DataError,
/// FormatError.
LoadedModel load_model(const ModelOptions& options, const CommonOptions& common, const LoadNeeds& needs = {});

}  // namespace moesaic::cli
