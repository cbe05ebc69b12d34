// What most programs begin with: a model or a composition, its tokenizer, its chat template and its adapters.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/models/language_model.h"
#include "moesaic/run/sentence_encoder.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::run {

/// An adapter to attach.
struct AdapterReference {
  std::string name;  // by which requests and routing records call it
  std::filesystem::path dir;
  double scale = 1.0;  // of its effect
};
/// [NAME=]DIR[:scale]; NAME is the folder's own when it is left out. Throws UsageError when the folder does not exist
/// or the scale is no number.
AdapterReference parse_adapter_reference(const std::string& text);

/// Where the base model stands that an adapter's folder names in its adapter_config.json. A relative path is looked for
/// where the run that left the adapter was started, then here, then beside the adapter. Throws UsageError naming all
/// places when it is in none.
std::filesystem::path base_of(const std::filesystem::path& adapter);

/// What a user names: a model, and the adapters beside it.
struct ModelReference {
  std::string model;
  std::vector<AdapterReference> adapters;
};
/// `named` is an adapter's folder, a model or a composition; `model` and `adapters` are --model and --adapter; each may
/// be empty. Without a model, it is the adapters' base. Throws UsageError for none, two, or adapters of different
/// bases.
ModelReference resolve_model(const std::string& named, const std::string& model,
                             const std::vector<std::string>& adapters);

struct OpenOptions {
  torch::Device device = torch::kCPU;         // where it computes
  torch::ScalarType dtype = torch::kFloat32;  // of frozen weights and activations
  bool quantize_int8 = false;                 // weight-only, of the frozen models
  bool needs_tokenizer = true;                // else a model that comes without one is fine
};

/// A model ready to run.
struct Opened {
  std::shared_ptr<formats::Checkpoint> checkpoint;  // of a composition its anchor's
  std::shared_ptr<models::LanguageModel> model;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;   // nullptr when it has none and none is needed
  std::shared_ptr<tokenizer::ChatTemplate> chat_template;  // nullptr when it has none
  bool int8 = false;                                       // frozen weights are quantised
  std::shared_ptr<SentenceEncoder> sentence_encoder;       // nullptr while no adapter's router reads one

  /// Before the adapter in `dir` is attached: gives the model the sentence encoder that its router reads, where it
  /// reads one. Throws UsageError where there is none or another adapter's is a different one, DataError for one that
  /// is not that of its training.
  void read_sentences_for(const std::filesystem::path& dir, const adapters::AdapterConfig& config);

  /// Ids that end an answer: those of generation_config.json, of the model's config and of the tokenizer, tokens known
  /// as ends of turn by their text, and what the chat template writes behind an answer.
  std::vector<int64_t> eos_ids() const;
};

/// path: a folder with config.json, a .gguf file, or a composition's folder. Adapters go into the model's first part,
/// in a composition the anchor. Chat templates and special tokens that a composition or an adapter brings win over the
/// model's; of several adapters, the first one's. Throws UsageError, DataError, FormatError.
Opened open(const std::string& path, const std::vector<AdapterReference>& adapters = {},
            const OpenOptions& options = {});

/// Makes the chat template of a model at `path` with its own tokenizer, and what a composition and the adapters bring
/// of both; `embeds`: the one adapter brings the embedding.
void adapt_tokenizer(const std::string& path, const std::vector<AdapterReference>& adapters, bool embeds,
                     Opened& opened);

/// The same union of end-of-answer ids for a model whose tokenizer and generation config are at hand.
std::vector<int64_t> eos_ids(const models::LanguageModel& model, const Json& generation_config,
                             const tokenizer::Tokenizer* tokenizer,
                             const tokenizer::ChatTemplate* chat_template = nullptr);

/// A request's adapters, {"name": weight, ...} or ["name", ...], as a row of `mixture`: the named ones with their
/// weights (1 in a list), the others with 0. Throws UsageError for unknown names and for what is no finite weight;
/// `where` begins its message.
std::vector<double> mixture_row(const models::LanguageModel& model, const OrderedJson& adapters,
                                const std::string& where);

}  // namespace moesaic::run
