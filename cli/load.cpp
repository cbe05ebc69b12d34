#include "cli/load.h"

#include <future>

#include "moesaic/base/device.h"
#include "moesaic/compose/folder.h"
#include "moesaic/generate/sentence.h"

namespace moesaic::cli {
namespace fs = std::filesystem;

void add_model_options(CLI::App& app, ModelOptions& options) {
  app.add_option("--model", options.model, "Model: a folder with config.json, a .gguf file, or a composition's folder")
      ->required();
  app.add_option("--adapter", options.adapters, "Adapter folder, [NAME=]DIR[:scale]; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--quantize", options.quantize, "none or int8 (weight-only, of the frozen model)")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "int8"}));
}

void add_sampling_options(CLI::App& app, generate::SamplingOptions& options) {
  const char* group = "Sampling";
  app.add_option("--max_new_tokens", options.max_new_tokens, "Tokens of an answer at most")
      ->capture_default_str()
      ->group(group);
  app.add_option("--temperature", options.temperature, "0 takes the most probable token")
      ->capture_default_str()
      ->group(group);
  app.add_option("--top_k", options.top_k, "Draw from the k most probable tokens; 0 = off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--top_p", options.top_p, "Draw from the most probable tokens that hold this mass; 1 = off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--min_p", options.min_p, "Drop tokens below this share of the best one's probability; 0 = off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--repetition_penalty", options.repetition_penalty, "Above 1 makes tokens already seen less likely")
      ->capture_default_str()
      ->group(group);
  app.add_option("--stop", options.stop, "Text that ends an answer and is cut from it; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(group);
}

void add_task_options(CLI::App& app, std::vector<std::string>& tasks, eval::TaskOptions& task,
                      eval::EvalOptions& options) {
  app.add_option("--tasks", tasks, "Task files or folders, comma-separated or repeated")->required()->delimiter(',');
  app.add_option("--limit", task.limit, "Questions per task at most; 0 = all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--apply_chat_template", options.apply_chat_template, "Ask through the model's chat template");
}

AdapterFlag parse_adapter_flag(const std::string& flag) {
  AdapterFlag adapter;
  std::string rest = flag;
  size_t equals = flag.find('=');
  if (equals != std::string::npos && flag.find('/') > equals) {
    adapter.name = flag.substr(0, equals);
    rest = flag.substr(equals + 1);
  }
  size_t colon = rest.rfind(':');
  if (!fs::exists(rest) && colon != std::string::npos) {
    const std::string scale = rest.substr(colon + 1);
    size_t used = 0;
    try {
      adapter.scale = std::stod(scale, &used);
    } catch (const std::exception&) {
    }
    MOESAIC_CHECK(used > 0 && used == scale.size() && std::isfinite(adapter.scale), UsageError,
                  "--adapter {}: the scale behind ':' is no number: got '{}'. Expected [NAME=]DIR[:scale].", flag,
                  scale);
    rest.resize(colon);
  }
  adapter.dir = rest;
  MOESAIC_CHECK(fs::is_directory(adapter.dir), UsageError,
                "--adapter {}: '{}' is no folder. Expected [NAME=]DIR[:scale], DIR holding adapter_config.json.", flag,
                rest);
  if (adapter.name.empty()) {
    const fs::path dir = adapter.dir.lexically_normal();
    adapter.name = (dir.has_filename() ? dir : dir.parent_path()).filename().string();
  }
  return adapter;
}

std::vector<int64_t> eos_ids(const models::CausalLM& model, const Json& generation_config,
                             const tokenizer::Tokenizer* tokenizer) {
  std::set<int64_t> ids(model.config().eos_ids.begin(), model.config().eos_ids.end());
  if (auto it = generation_config.find("eos_token_id"); it != generation_config.end()) {
    for (const Json& id : it->is_array() ? *it : Json::array({*it})) {
      if (id.is_number_integer()) ids.insert(id.get<int64_t>());
    }
  }
  if (tokenizer && tokenizer->eos_id()) ids.insert(*tokenizer->eos_id());
  return {ids.begin(), ids.end()};
}

bool LoadedModel::routes_by_sentence() const {
  return std::any_of(adapters.begin(), adapters.end(),
                     [](const auto& adapter) { return adapter->config().router.input == "sentence"; });
}

torch::Tensor LoadedModel::sentence_of(const std::vector<std::vector<int64_t>>& prompts) const {
  if (!routes_by_sentence()) return {};
  for (size_t i = 0; i < adapters.size(); ++i) {
    const adapters::RouterConfig& router = adapters[i]->config().router;
    MOESAIC_CHECK(
        router.input != "sentence" || router.sentence_source == "hidden", UsageError,
        "adapter {}: its router reads sentence embeddings from a data column; they can't be made from a prompt. "
        "Use data with that column.",
        adapter_names[i]);
  }
  return generate::sentence_embeddings(*model, nn::RaggedBatch::from_sequences(prompts, model->device()));
}

eval::EvalModel LoadedModel::for_evaluation() const {
  eval::EvalModel view{*model, *tokenizer, chat_template.get()};
  view.composition = composition.get();
  for (const auto& adapter : adapters) {
    const adapters::AdapterConfig& config = adapter->config();
    view.routed = view.routed || config.num_experts > 1;
    if (config.router.input != "sentence") continue;
    (config.router.sentence_source == "hidden" ? view.sentence_from_hidden : view.sentence_from_column) = true;
  }
  MOESAIC_CHECK(!view.sentence_from_hidden || !view.sentence_from_column, UsageError,
                "--adapter: one adapter routes by the model's own sentence embedding and another by a data column's. "
                "Evaluate them one at a time.");
  return view;
}

namespace {

/// A composition and its anchor's parts.
LoadedModel open_composition(const std::string& path, const models::LoadOptions& options, const LoadNeeds& needs) {
  MOESAIC_CHECK(
      needs.composition, UsageError,
      "--model {}: a composition; this command runs single models only. Expected a folder with config.json or "
      "a .gguf file.",
      path);
  LoadedModel loaded;
  loaded.composition = compose::load_composition(path, options);
  const compose::Member& anchor = loaded.composition->anchor_member();
  MOESAIC_CHECK(anchor.tokenizer || !needs.tokenizer, DataError, "{}: no tokenizer found, expected tokenizer.json",
                anchor.checkpoint->path().string());
  loaded.checkpoint = anchor.checkpoint;
  loaded.model = anchor.model;
  loaded.tokenizer = anchor.tokenizer;
  return loaded;
}

/// A single model, its tokenizer read beside.
void open_single(const std::string& path, const models::LoadOptions& options, const LoadNeeds& needs,
                 LoadedModel& loaded) {
  loaded.checkpoint = formats::Checkpoint::open(path);
  // Building the tokenizer takes as long as reading the weights of a small model: side by side.
  auto tokenizer = std::async(std::launch::async, [&]() -> std::shared_ptr<const tokenizer::Tokenizer> {
    if (!needs.tokenizer && !loaded.checkpoint->tokenizer_json()) return nullptr;
    return tokenizer::Tokenizer::open(*loaded.checkpoint);
  });
  loaded.model = models::CausalLM::load(*loaded.checkpoint, options);
  loaded.model->eval();
  loaded.tokenizer = tokenizer.get();
}

}  // namespace

LoadedModel load_model(const ModelOptions& options, const CommonOptions& common, const LoadNeeds& needs) {
  MOESAIC_CHECK(
      fs::exists(options.model), UsageError,
      "--model {}: no such file or folder. Expected a folder with config.json and *.safetensors, or a .gguf file.",
      options.model);
  std::vector<AdapterFlag> flags;
  for (const std::string& flag : options.adapters) flags.push_back(parse_adapter_flag(flag));
  const c10::Device device = parse_device(common.device);
  const c10::ScalarType dtype = parse_dtype(common.dtype, device);

  const models::LoadOptions load{dtype, device, options.quantize == "int8"};
  LoadedModel loaded =
      compose::is_composition(options.model) ? open_composition(options.model, load, needs) : LoadedModel{};
  if (!loaded.composition) open_single(options.model, load, needs, loaded);
  if (loaded.tokenizer) loaded.chat_template = tokenizer::ChatTemplate::open(*loaded.checkpoint, *loaded.tokenizer);
  for (const AdapterFlag& flag : flags) {
    loaded.adapters.push_back(
        adapters::Adapter::load(flag.dir, loaded.model->sites(), device, loaded.checkpoint->fingerprint(), flag.scale));
    loaded.adapter_names.push_back(flag.name);
  }
  return loaded;
}

}  // namespace moesaic::cli
