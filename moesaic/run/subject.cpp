#include "moesaic/run/subject.h"

#include "moesaic/adapters/mix.h"
#include "moesaic/base/check.h"
#include "moesaic/base/device.h"
#include "moesaic/base/seed.h"
#include "moesaic/compose/folder.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "moesaic/run/new_model.h"
#include "moesaic/run/sentence_encoder.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;

int64_t numbers_of(const models::LanguageModel& model) {
  int64_t numbers = 0;
  for (const torch::Tensor& weight : model.weights()) numbers += weight.numel();
  return numbers;
}

void refuse_composition_keys(const RunConfig& run, const std::string& where) {
  MOESAIC_CHECK(!run.train_adapters && run.state_cache_dir.empty(), UsageError,
                "{}: train_adapters, state_cache_dir: got them for {}, expected finetuning_type calm", where,
                run.finetuning_type);
}

void refuse_tokenizer(const RunConfig& run, const std::string& where) {
  MOESAIC_CHECK(run.tokenizer.empty() && run.tokenizer_vocab_size == 0, UsageError,
                "{}: tokenizer: got one for init {} and finetuning_type {}, expected random and full: a trained model "
                "keeps the tokenizer it was trained with",
                where, run.init, run.finetuning_type);
}

/// True of a folder with a config.json and no file of weights.
bool lacks_weights(const fs::path& folder) {
  if (!fs::is_regular_file(folder / "config.json")) return false;
  const fs::directory_iterator entries(folder);
  return std::none_of(begin(entries), end(entries), [](const fs::directory_entry& entry) {
    return entry.path().extension() == ".safetensors" || entry.path().extension() == ".bin";
  });
}

/// The single model that a run begins with: read, or drawn from its seed; without numbers for a plan.
std::shared_ptr<models::SingleModel> open_base(const RunConfig& run, const Place& place, Prepared& made) {
  MOESAIC_CHECK(!compose::is_composition(run.model_name_or_path), UsageError,
                "finetuning_type {}: model_name_or_path {} is a composition, expected a single model, or "
                "finetuning_type calm",
                run.finetuning_type, run.model_name_or_path);
  const bool random = run.init == "random";
  const bool planned = !random && place.dry && lacks_weights(run.model_name_or_path);
  if (planned) made.plan.add("weights", "none in the folder: planned from its config.json");
  if (random) {
    NewModel blank = open_new_model(run);
    made.checkpoint = blank.checkpoint;
    if (!blank.tokenizer.empty()) made.plan.add("tokenizer", blank.tokenizer);
  } else {
    made.checkpoint = models::open_checkpoint(run.model_name_or_path, /*weights=*/!planned);
  }
  place.opened(*made.checkpoint);
  std::shared_ptr<models::SingleModel> model;
  const torch::Device device = place.dry ? torch::Device(torch::kMeta) : place.device;
  if (random || planned) {
    model =
        models::make_model(made.checkpoint->config(), run.model_name_or_path, torch::dtype(place.dtype).device(device));
    if (!place.dry) model->initialize(derive_seed(run.train.seed, "init"));
  } else {
    model = models::load_model(*made.checkpoint, {.dtype = place.dtype, .device = device});
  }
  made.base_parameters = numbers_of(*model);
  made.model = model;
  return model;
}

// --- adapters

void check_adapter(RunConfig& run, const std::string& where) {
  refuse_composition_keys(run, where);
  refuse_tokenizer(run, where);
}

}  // namespace

std::shared_ptr<adapters::Adapter> begin_adapter(const RunConfig& run, const Place& place,
                                                 const formats::Checkpoint& checkpoint, models::LanguageModel& model) {
  nn::Sites& sites = *model.parts().front().sites;
  adapters::AdapterConfig wanted = run.adapter;
  const bool no_targets = std::visit([](const auto& targets) { return targets.empty(); }, wanted.targets);
  if (no_targets) wanted = adapters::resolve_targets(wanted, run.target_preset, sites);
  wanted.base_model_name_or_path = run.model_name_or_path;
  wanted.base_dtype = dtype_name(place.dtype);
  if (!place.dry && run.init == "pretrained") wanted.base_fingerprint = checkpoint.fingerprint();
  if (const std::string folder = wanted.sentence_encoder(); !folder.empty()) {
    const auto encoder = open_sentence_encoder(folder, tokenizer::Tokenizer::open(checkpoint), model.facts().device);
    int64_t& width = wanted.router.sentence_dim;
    MOESAIC_CHECK(width == 0 || width == encoder->width(), UsageError,
                  "router.sentence_dim: got {}, expected {}, the width of {}", width, encoder->width(), folder);
    width = encoder->width();
    wanted.sentence_fingerprint = encoder->fingerprint();
    model.read_sentences_with(encoder);
  }
  const auto adapter = adapters::Adapter::create(wanted, sites, place.dry ? torch::kMeta : place.device,
                                                 derive_seed(run.train.seed, "adapter"));
  if (!run.adapter_name_or_path.empty()) {
    try {
      adapter->load(run.adapter_name_or_path);
    } catch (const DataError& error) {
      throw DataError(fmt::format(
          "adapter_name_or_path {}: it doesn't fit the run's model_name_or_path, lora_target, feedforward_modules, "
          "layers_to_transform and router.input: {}",
          run.adapter_name_or_path, error.what()));
    }
  }
  return adapter;
}

namespace {

Prepared open_adapter(const RunConfig& run, const Place& place) {
  Prepared made;
  const auto model = open_base(run, place, made);
  const auto adapter = begin_adapter(run, place, *made.checkpoint, *model);
  model->attach(run.finetuning_type, adapter);
  const adapters::AdapterConfig& settled = adapter->config();
  made.plan.add("method", settled.num_experts > 1 ? fmt::format("{}, {} experts, {} router on {}", settled.method,
                                                                adapters::experts_json(settled).dump(),
                                                                settled.router.type, settled.router.input)
                                                  : settled.method);
  std::vector<std::string> hits;
  for (const auto& [pattern, count] : adapter->matches()) hits.push_back(fmt::format("{} {}", pattern, count));
  made.plan.add("sites", fmt::format("{}", fmt::join(hits, ", ")));
  made.learner = adapter;
  return made;
}

// --- the routers of a mix

void check_mix(RunConfig& run, const std::string& where) {
  check_adapter(run, where);
  MOESAIC_CHECK(
      run.adapters.empty() != run.adapter_name_or_path.empty(), UsageError,
      "{}: finetuning_type mix: got {}, expected one: adapters (a list of LoRA folders) are new experts, "
      "adapter_name_or_path is a MoLoRA whose routers are trained",
      where,
      run.adapters.empty() ? "neither adapters nor adapter_name_or_path" : "both adapters and adapter_name_or_path");
}

Prepared open_mix(const RunConfig& run, const Place& place) {
  Prepared made = open_adapter(run, place);
  const auto adapter = std::static_pointer_cast<adapters::Adapter>(made.learner);
  const auto routers = std::make_shared<adapters::Routers>(adapter);
  made.learner = routers;
  int64_t frozen = 0;
  for (const nn::Parameter& parameter : adapter->parameters()) {
    if (parameter.kind != nn::Parameter::Kind::kRouter) frozen += static_cast<int64_t>(parameter.tensor.nbytes());
  }
  made.more_memory = [frozen](int64_t) {
    return std::vector<std::pair<std::string, int64_t>>{{"frozen experts", frozen}};
  };
  if (run.adapters.empty()) {
    made.plan.add("experts", fmt::format("those of {}, frozen", run.adapter_name_or_path));
    return made;
  }
  std::vector<adapters::MixPart> parts;
  for (const std::string& dir : run.adapters) {
    parts.push_back(adapters::read_mix_part(dir));
    adapters::warn_of_other_base(parts.back().config, adapter->config().base_fingerprint, dir);
  }
  formats::AdapterFolder experts = adapters::mix(parts, run.adapter.router);
  for (const nn::Parameter& router : routers->parameters()) experts.tensors[router.name + ".weight"] = router.tensor;
  try {
    adapter->load_tensors(experts.tensors);
  } catch (const DataError& error) {
    throw DataError(fmt::format("adapters {}: they don't fit the run's model_name_or_path: {}",
                                fmt::join(run.adapters, ", "), error.what()));
  }
  for (size_t e = 0; e < parts.size(); ++e) {
    made.plan.add(e == 0 ? "experts" : "", adapters::describe(parts[e], experts) + ", frozen");
  }
  return made;
}

// --- all weights

void check_full(RunConfig& run, const std::string& where) {
  refuse_composition_keys(run, where);
  MOESAIC_CHECK(run.adapter_name_or_path.empty(), UsageError,
                "{}: adapter_name_or_path: got one for finetuning_type full, expected none\nhint: `moesaic merge` it "
                "into its base and begin there",
                where);
  MOESAIC_CHECK(run.dtype != "bfloat16", UsageError,
                "{}: bf16: got true, expected false for full fine-tuning, whose weights must hold small updates",
                where);
  run.dtype = "float32";
}

Prepared open_full(const RunConfig& run, const Place& place) {
  Prepared made;
  const auto model = open_base(run, place, made);
  formats::ModelFolder folder;
  folder.config = made.checkpoint->config();
  folder.dtype = place.dtype;
  folder.tokenizer = made.checkpoint->tokenizer_files();
  folder.tokenizer.chat_templates = data::chat_templates(*made.checkpoint, run.render.template_name);
  folder.generation_config = made.checkpoint->generation_config();
  made.learner = std::make_shared<models::AllWeights>(model, std::move(folder), run.trainable);
  return made;
}

// --- compositions

void check_calm(RunConfig& run, const std::string& where) {
  refuse_tokenizer(run, where);
  MOESAIC_CHECK(run.init == "pretrained" && run.adapter_name_or_path.empty(), UsageError,
                "{}: finetuning_type calm trains the connections of the folder that model_name_or_path names: got init "
                "{} and adapter_name_or_path '{}', expected pretrained and none",
                where, run.init, run.adapter_name_or_path);
}

Prepared open_calm(const RunConfig& run, const Place& place) {
  constexpr double kGib = 1 << 30, kMib = 1 << 20;
  MOESAIC_CHECK(compose::is_composition(run.model_name_or_path), UsageError,
                "finetuning_type calm: model_name_or_path {} is none of `moesaic compose`, expected a composition's "
                "folder",
                run.model_name_or_path);
  const auto composition =
      compose::load_composition(run.model_name_or_path, {.dtype = place.dtype, .device = place.device});
  Prepared made;
  made.checkpoint = composition->anchor_member().checkpoint;
  place.opened(*made.checkpoint);
  made.keeps_tokenizer = false;  // the folder names the models, which bring their own
  made.learner = std::make_shared<compose::Connections>(composition, run.train_adapters);
  made.base_parameters = numbers_of(*composition->anchor_member().model);
  made.model = composition;
  std::vector<std::string> paths;
  for (const auto& member : composition->augmenting()) paths.push_back(member.checkpoint->path().string());
  made.plan.add("method", fmt::format("calm, augmenting {}", fmt::join(paths, ", ")));
  for (const auto& [at, adapter] : composition->adapters()) {
    made.plan.add("adapter", fmt::format("{} of the {}, {}", adapter->config().method, at,
                                         run.train_adapters ? "trained too" : "frozen"));
  }
  auto states = std::make_shared<std::shared_ptr<compose::StateCache>>();
  made.begin = [=, gib = run.state_cache_gib, dir = run.state_cache_dir](bool reads_again) {
    if ((!reads_again && dir.empty()) || gib <= 0) return;
    *states = std::make_shared<compose::StateCache>(static_cast<int64_t>(gib * kGib), dir);
    composition->keep_states(*states);
  };
  made.end = [=] {
    if (!*states || (*states)->hits() + (*states)->misses() == 0) return;
    spdlog::info("frozen states: {} of {} sequences from the cache, which holds {:.1f} MiB", (*states)->hits(),
                 (*states)->hits() + (*states)->misses(), static_cast<double>((*states)->bytes()) / kMib);
  };
  made.more_memory = [=, gib = run.state_cache_gib, in_memory = run.state_cache_dir.empty(),
                      steps = run.train.max_steps * run.train.micro_batches()](int64_t tokens) {
    std::vector<std::pair<std::string, int64_t>> parts;
    if (gib <= 0 || !in_memory) return parts;
    const double all =
        steps > 0 ? static_cast<double>(composition->state_bytes(tokens)) * static_cast<double>(steps) : gib * kGib;
    parts.emplace_back("state cache, most", static_cast<int64_t>(std::min(gib * kGib, all)));
    return parts;
  };
  return made;
}

/// Adapters by adapters::method_names(), then what is no adapter.
const std::vector<Subject>& subjects() {
  static const std::vector<Subject> kSubjects = [] {
    std::vector<Subject> all;
    for (const std::string& name : adapters::method_names()) {
      const adapters::Method& method = adapters::method_of(name);
      all.push_back({method.name, &method, check_adapter, open_adapter});
    }
    all.push_back({kMix, &adapters::method_of("molora"), check_mix, open_mix});
    all.push_back({"calm", nullptr, check_calm, open_calm});
    all.push_back({"full", nullptr, check_full, open_full});
    return all;
  }();
  return kSubjects;
}

}  // namespace

const Subject& subject_of(const std::string& finetuning_type) {
  std::vector<std::string> names;
  for (const Subject& subject : subjects()) {
    if (finetuning_type == subject.name) return subject;
    names.emplace_back(subject.name);
  }
  const std::string nearest = nearest_name(finetuning_type, names);
  throw UsageError(fmt::format("finetuning_type: got '{}', expected one of {}{}", finetuning_type,
                               fmt::join(names, ", "),
                               nearest.empty() ? "" : fmt::format(". Did you mean '{}'?", nearest)));
}

}  // namespace moesaic::run
