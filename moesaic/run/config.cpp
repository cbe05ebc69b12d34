#include "moesaic/run/config.h"

#include <regex>

#include "moesaic/adapters/mix.h"
#include "moesaic/adapters/replacements.h"
#include "moesaic/base/device.h"
#include "moesaic/base/yaml.h"
#include "moesaic/data/templates.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/run/foreign_keys.h"
#include "moesaic/run/subject.h"
#include "moesaic/train/checkpoint.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;

/// Other tools' names of our keys (axolotl, torchtune, transformers, PEFT).
constexpr std::pair<const char*, const char*> kAliases[] = {
    {"base_model", "model_name_or_path"},
    {"adapter", "finetuning_type"},
    {"method", "finetuning_type"},
    {"lora_r", "lora_rank"},
    {"r", "lora_rank"},
    {"lora_target_modules", "lora_target"},
    {"target_modules", "lora_target"},
    {"datasets", "dataset"},
    {"chat_template", "template"},
    {"sequence_len", "cutoff_len"},
    {"max_length", "cutoff_len"},
    {"sample_packing", "packing"},
    {"neat_packing", "packing"},
    {"micro_batch_size", "per_device_train_batch_size"},
    {"batch_size", "per_device_train_batch_size"},
    {"num_epochs", "num_train_epochs"},
    {"epochs", "num_train_epochs"},
    {"lr", "learning_rate"},
    {"lr_scheduler", "lr_scheduler_type"},
    {"optimizer", "optim"},
    {"adam_eps", "adam_epsilon"},
    {"log_every_n_steps", "logging_steps"},
    {"enable_activation_checkpointing", "gradient_checkpointing"},
    {"evaluation_strategy", "eval_strategy"},
    {"early_stopping_steps", "early_stopping_patience"},
    {"router_aux_loss_coef", "moe_aux_loss_coef"},
    {"mix_strategy", "mixture_rule"},
};

/// What `alias` stands for; `alias` itself where it is none.
std::string key_of(const std::string& alias, const std::string& where) {
  for (const auto& [name, key] : kAliases) {
    if (alias != name) continue;
    spdlog::info("{}: '{}' is read as '{}'", where, alias, key);
    return key;
  }
  return alias;
}

OrderedJson with_aliases(OrderedJson json, const std::string& where) {
  auto rename = [&](OrderedJson& block, const std::string& alias, const std::string& key, OrderedJson value) {
    MOESAIC_CHECK(!block.contains(key), UsageError, "{}: got both '{}' and '{}', which mean the same; give one", where,
                  alias, key);
    block.erase(alias);
    block[key] = std::move(value);
  };
  for (const auto& [alias, key] : kAliases) {
    if (json.contains(alias)) rename(json, alias, key_of(alias, where), OrderedJson(json[alias]));
  }
  if (json.contains("router") && json["router"].is_object() && json["router"].contains("renormalize")) {
    const bool renormalize = get<bool>(json["router"], "renormalize", where + ": router");
    rename(json["router"], "renormalize", "topk_mode", renormalize ? "renorm" : "mask");
  }
  return json;
}

std::vector<std::string> split_commas(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    const size_t begin = part.find_first_not_of(' '), end = part.find_last_not_of(' ');
    if (begin != std::string::npos) parts.push_back(part.substr(begin, end - begin + 1));
  }
  return parts;
}

/// tokenizer: a path, or {train: bpe, vocab_size: N}.
void parse_tokenizer(const Json& json, const std::string& where, RunConfig& run) {
  if (json.is_null()) return;
  MOESAIC_CHECK(run.init == "random", UsageError,
                "{}: got one for init {} and finetuning_type {}, expected random and full: a trained model keeps the "
                "tokenizer it was trained with",
                where, run.init, run.finetuning_type);
  MOESAIC_CHECK((json.is_string() && !json.get_ref<const std::string&>().empty()) || json.is_object(), UsageError,
                "{}: got {}, expected a folder, a file or {{train: bpe, vocab_size: N}}", where, json.dump());
  if (json.is_string()) {
    run.tokenizer = json.get<std::string>();
    return;
  }
  const auto kind = get<std::string>(json, "train", where);
  MOESAIC_CHECK(kind == "bpe", UsageError, "{}.train: got '{}', expected bpe", where, kind);
  run.tokenizer_vocab_size = get<int64_t>(json, "vocab_size", where);
  MOESAIC_CHECK(run.tokenizer_vocab_size >= tokenizer::Tokenizer::kSmallestTrained, UsageError,
                "{}.vocab_size: got {}, expected at least {}: 256 bytes, <bos>, <eos> and <pad>", where,
                run.tokenizer_vocab_size, tokenizer::Tokenizer::kSmallestTrained);
}

/// A list of names, names separated by commas, or one regex over whole module paths.
adapters::TargetPattern parse_modules(const Json& json, const char* key, const std::string& where) {
  if (json.at(key).is_array()) return get<std::vector<std::string>>(json, key, where);
  auto text = get<std::string>(json, key, where);
  if (text.find_first_of("*+?[](){}|\\^$") != std::string::npos) return text;
  return split_commas(text);
}

/// lora_target: a preset, or modules.
void parse_target(const Json& json, const std::string& where, RunConfig& run) {
  const Json& target = json.at("lora_target");
  if (target.is_null()) return;
  if (target == "all" || target == "all-linear") {
    run.target_preset = "all-linear";
  } else if (target == "reference") {
    run.target_preset = "reference";
  } else {
    run.adapter.targets = parse_modules(json, "lora_target", where);
  }
}

/// feedforward_modules: the (IA)^3 and MoV targets that scale their input; down_proj and wo unless it says otherwise.
void parse_feedforward(const Json& json, const std::string& where, RunConfig& run) {
  auto& adapter = run.adapter;
  const adapters::Method* method = subject_of(run.finetuning_type).method;
  const bool scales = method != nullptr && !method->low_rank;
  const auto* targets = std::get_if<std::vector<std::string>>(&adapter.targets);
  if (!json.at("feedforward_modules").is_null()) {
    MOESAIC_CHECK(scales && !json.at("lora_target").is_null(), UsageError,
                  "{}: feedforward_modules: got {} for {}, expected it for ia3 and mov, together with lora_target: it "
                  "says which of these scale their input",
                  where, json.at("feedforward_modules").dump(), adapter.method);
    adapter.feedforward = parse_modules(json, "feedforward_modules", where);
  } else if (scales && targets != nullptr) {
    std::vector<std::string> names;
    std::copy_if(targets->begin(), targets->end(), std::back_inserter(names),
                 [](const std::string& name) { return name.ends_with("down_proj") || name.ends_with("wo"); });
    adapter.feedforward = names;
  } else if (scales) {
    adapter.feedforward = R"(.*(down_proj|\.wo))";
  }
}

adapters::RouterConfig parse_router(const Json& router, const std::string& where) {
  MOESAIC_CHECK(router.is_object(), UsageError, "{}: got {}, expected keys and values", where, router.dump());
  const auto dtype = get_or<std::string>(router, "dtype", "float32", where);
  MOESAIC_CHECK(dtype == "float32", UsageError,
                "{}: dtype: got '{}', expected float32: routers compute in float32, whatever the model's format", where,
                dtype);
  auto config = adapters::parse_router_config(router, where);
  if (config.top_k > 0) config.type = "top_k";
  return config;
}

/// A list of names, or names separated by commas.
std::vector<std::string> names(const Json& json, const char* key, const std::string& where) {
  const auto value = json.find(key);
  if (value != json.end() && value->is_string()) return split_commas(value->get<std::string>());
  return get_or<std::vector<std::string>>(json, key, {}, where);
}

/// eval: {tasks, steps, limit, max_gen_toks}: task files to score while training.
void parse_eval(const Json& json, const std::string& where, RunConfig& run) {
  MOESAIC_CHECK(json.is_object(), UsageError, "{}: got {}, expected keys and values", where, json.dump());
  run.eval_tasks = names(json, "tasks", where);
  run.train.task_eval_steps = get_or<int64_t>(json, "steps", 0, where);
  run.eval_limit = get_or<int64_t>(json, "limit", 0, where);
  run.eval_max_gen_toks = get_or<int64_t>(json, "max_gen_toks", run.eval_max_gen_toks, where);
  MOESAIC_CHECK(run.train.task_eval_steps >= 0 && run.eval_limit >= 0, UsageError,
                "{}: got steps {} and limit {}, expected numbers from 0", where, run.train.task_eval_steps,
                run.eval_limit);
  MOESAIC_CHECK(run.eval_max_gen_toks > 0, UsageError, "{}: got max_gen_toks {}, expected 1 or more", where,
                run.eval_max_gen_toks);
  MOESAIC_CHECK(!run.eval_tasks.empty() || (run.train.task_eval_steps == 0 && run.eval_limit == 0), UsageError,
                "{}: got no tasks, expected files to score every {} steps", where, run.train.task_eval_steps);
}

/// What an adapter's folder says in a run's words. `silent` are those keys of it that no tensor's shape shows: a run
/// that says otherwise would compute something else, and nothing would tell.
struct AdapterKeys {
  OrderedJson values = OrderedJson::object();
  std::vector<std::string> silent;
};

AdapterKeys adapter_keys(const formats::AdapterFolder& folder, const std::string& where) {
  const adapters::AdapterConfig config = adapters::parse_adapter_config(folder, where + "/adapter_config.json");
  const std::vector<std::string> frozen = adapters::acting_whole(config, folder.tensors);
  MOESAIC_CHECK(frozen.empty(), UsageError,
                "{}: got an adapter with {} for a run to begin with, expected one without: what acts through a weight "
                "of the model as a whole is used, not trained\nhint: `moesaic merge` it into its base and begin there",
                where, fmt::join(frozen, ", "));
  AdapterKeys keys;
  OrderedJson& values = keys.values;
  values["finetuning_type"] = config.method;
  keys.silent = {"finetuning_type", "num_experts"};
  values["num_experts"] = adapters::experts_json(config);
  auto modules = [](const adapters::TargetPattern& pattern) {
    return std::visit([](const auto& targets) { return Json(targets); }, pattern);
  };
  values["lora_target"] = modules(config.targets);
  if (!config.layers_to_transform.empty()) values["layers_to_transform"] = config.layers_to_transform;
  if (adapters::method_of(config.method).low_rank) {
    values["lora_rank"] = config.lora_rank;
    values["lora_alpha"] = config.lora_alpha;
    values["lora_dropout"] = config.lora_dropout;
    values["use_rslora"] = config.use_rslora;
    values["rank_pattern"] = config.rank_pattern;
    values["alpha_pattern"] = config.alpha_pattern;
    keys.silent.insert(keys.silent.end(), {"lora_rank", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"});
  } else {
    values["feedforward_modules"] = modules(config.feedforward);
    values["k_site"] = config.k_site;
    keys.silent.emplace_back("k_site");
  }
  // A run has no key for what is left out, nor for a multi-modal model's names: the sites themselves have neither.
  if (!config.spelling.empty() || modules(config.exclude).size() > 0) {
    std::set<std::string> sites;
    for (const auto& [name, tensor] : folder.tensors) {
      if (const std::string site = adapters::module_of(name); !site.empty()) sites.insert(site);
    }
    values["lora_target"] = sites;
    for (const std::string& site : sites) {
      if (config.rank_at(site) != config.lora_rank) values["rank_pattern"][site] = config.rank_at(site);
    }
  }
  if (config.num_experts > 1) {
    values["router"] = adapters::router_config_json(config.router);
    for (const char* key : {"type", "top_k", "topk_mode", "input", "sentence_dim", "sentence_source", "temperature",
                            "logits", "head_wise"}) {
      keys.silent.push_back(fmt::format("router.{}", key));
    }
  }
  return keys;
}

/// The adapter a run begins with, and whether it goes on with its own checkpoint; nullopt when there is none.
std::optional<std::pair<fs::path, bool>> adapter_begun(const Json& json, const std::string& where) {
  fs::path resumed = get_or<std::string>(json, "resume_from_checkpoint", "none", where);
  if (resumed == "auto") {
    const auto newest = train::newest_checkpoint(get<std::string>(json, "output_dir", where));
    resumed = newest ? newest->path : fs::path();
  }
  std::error_code error;
  if (!resumed.empty() && resumed != "none" && fs::exists(resumed / "adapter_config.json", error)) {
    return std::pair(resumed, true);
  }
  const auto begun = get_or<std::string>(json, "adapter_name_or_path", "", where);
  if (begun.empty()) return std::nullopt;
  return std::pair(fs::path(begun), false);
}

const OrderedJson* at_dotted(const OrderedJson& json, const std::string& key) {
  const size_t dot = key.find('.');
  if (dot == std::string::npos) return json.contains(key) && !json[key].is_null() ? &json[key] : nullptr;
  const auto block = json.find(key.substr(0, dot));
  return block == json.end() || !block->is_object() ? nullptr : at_dotted(*block, key.substr(dot + 1));
}

/// What the folders under `adapters` say in a run's words when they are the experts; the router is the run's.
AdapterKeys mix_keys(const std::vector<std::string>& dirs) {
  std::vector<adapters::MixPart> parts;
  for (const std::string& dir : dirs) parts.push_back(adapters::read_mix_part(dir));
  AdapterKeys keys = adapter_keys(adapters::mix(parts, {}), fmt::format("{}", fmt::join(dirs, ", ")));
  std::erase_if(keys.silent, [](const std::string& key) { return key.starts_with("router."); });
  keys.silent.insert(keys.silent.end(), {"lora_target", "layers_to_transform"});
  keys.values.erase("router");
  return keys;
}

/// Puts the settings of the adapter `begun` into `json`. What `user` says otherwise is an error, or, when the run goes
/// on with a checkpoint (`resumed`), said and done.
void take_keys(AdapterKeys keys, const std::string& begun, bool resumed, const OrderedJson& user,
               const std::string& where, OrderedJson& json) {
  OrderedJson given = user;
  for (auto it = given.begin(); it != given.end();) it = it->is_null() ? given.erase(it) : std::next(it);
  if (given.contains("lora_target")) keys.values.erase("feedforward_modules");

  // In the words of the folder: {"0-1": 4, "2": 4} is {"0-2": 4}, and top_k alone a type.
  OrderedJson said = given;
  if (said.contains("num_experts")) {
    adapters::AdapterConfig config;
    adapters::parse_experts(said["num_experts"], where + ": num_experts", config);
    said["num_experts"] = adapters::experts_json(config);
  }
  if (said.contains("router") && said["router"].is_object()) {
    const Json settled = adapters::router_config_json(parse_router(said["router"], where + ": router"));
    OrderedJson& router = said["router"];
    if (router.contains("top_k")) router["type"] = nullptr;
    for (auto& [key, value] : router.items()) {
      if (settled.contains(key)) value = settled[key];
    }
  }
  if (said.value("k_site", Json()) == "auto") said.erase("k_site");
  std::vector<std::string> differences;
  for (const std::string& key : keys.silent) {
    const OrderedJson *wanted = at_dotted(said, key), *has = at_dotted(keys.values, key);
    if (wanted != nullptr && has != nullptr && *wanted != *has) {
      differences.push_back(fmt::format("{}: got {}, it has {}", key, wanted->dump(), has->dump()));
    }
  }
  if (!differences.empty() && resumed) {
    spdlog::warn("{}: was made with other settings than this run's, which it goes on with: {}", begun,
                 fmt::join(differences, "; "));
  }
  MOESAIC_CHECK(differences.empty() || resumed, UsageError,
                "{}: the run begins with {}, whose numbers mean something else with other settings: {}\n"
                "hint: leave these keys out, and the adapter's own are taken",
                where, begun, fmt::join(differences, "; "));
  OrderedJson taken = keys.values;
  taken.merge_patch(given);
  json.merge_patch(taken);
  // Objects that are keys' values, not blocks of keys: the user's replace the adapter's whole.
  for (const char* key : {"num_experts", "rank_pattern", "alpha_pattern"}) {
    for (const OrderedJson* source : {&given, &keys.values}) {
      if (!source->contains(key)) continue;
      json[key] = (*source)[key];
      break;
    }
  }
}

/// A run that begins with an adapter's numbers has its settings, too; so has one whose experts are adapters.
void take_adapter_settings(const OrderedJson& user, const std::string& where, OrderedJson& json) {
  const std::string type = json.at("finetuning_type").is_string() ? json["finetuning_type"].get<std::string>() : "";
  const std::vector<std::string> methods = adapters::method_names();
  const bool mixes = type == kMix;
  if (!mixes && std::find(methods.begin(), methods.end(), type) == methods.end()) return;
  const std::vector<std::string> parts = names(json, "adapters", where);
  auto take = [&](AdapterKeys keys, const std::string& begun, bool resumed) {
    if (mixes) {
      MOESAIC_CHECK(keys.values["finetuning_type"] == "molora", UsageError,
                    "{}: finetuning_type mix: got {}, an adapter of type {}, expected a MoLoRA, whose routers are "
                    "trained",
                    where, begun, keys.values["finetuning_type"].get<std::string>());
      keys.values.erase("finetuning_type");
    }
    take_keys(std::move(keys), begun, resumed, user, where, json);
  };
  if (mixes && !parts.empty()) take(mix_keys(parts), fmt::format("a mix of {}", fmt::join(parts, ", ")), false);
  if (const auto begun = adapter_begun(json, where)) {
    const auto& [dir, resumed] = *begun;
    take(adapter_keys(formats::read_adapter_folder(dir), dir.string()), dir.string(), resumed);
  }
}

using train::KeyInfo;
constexpr const char *kModel = "Model and method", *kRouter = "Router", *kData = "Data", *kSteps = "Steps",
                     *kOutput = "Output";

/// visit(key, field, KeyInfo) for every key that a field of AdapterConfig takes as it stands.
template <class Config, class Visit>
void each_adapter_key(Config& adapter, Visit visit) {
  visit("lora_rank", adapter.lora_rank, KeyInfo{kModel, "r of every expert"});
  visit("lora_alpha", adapter.lora_alpha, KeyInfo{kModel, "the delta is scaled by alpha / r"});
  visit("lora_dropout", adapter.lora_dropout, KeyInfo{kModel, "on the input of the low-rank product, while training"});
  visit("use_rslora", adapter.use_rslora, KeyInfo{kModel, "scale by alpha / sqrt(r)"});
  visit(
      "rank_pattern", adapter.rank_pattern,
      KeyInfo{kModel, "other ranks: {regex at the end of the path: rank}; where several match, the first in the file"});
  visit("alpha_pattern", adapter.alpha_pattern, KeyInfo{kModel, "other alphas, likewise"});
  visit("k_site", adapter.k_site,
        KeyInfo{kModel,
                "where keys are scaled in models with q/k norm: `output` of k_proj, or `post_qk_norm`; `auto` chooses "
                "by model"});
}

const std::string& templates_help() {
  static const std::string kHelp = fmt::format(
      "`auto`: the model's chat templates, if it has any; `none`: raw text; `{}`: LLaMA-Factory's formats of these "
      "names; the name of one of the model's; or a Jinja file. The output folder keeps it, and whoever uses the result "
      "asks with it",
      fmt::join(data::template_names(), "`, `"));
  return kHelp;
}

/// The same for data::RenderOptions.
template <class Config, class Visit>
void each_render_key(Config& render, Visit visit) {
  visit("template", render.template_name, KeyInfo{kData, templates_help().c_str()});
  visit("cutoff_len", render.cutoff_len,
        KeyInfo{kData, "tokens of an example; a longer one loses the middle of its prompt first"});
  visit("source_cutoff_len", render.source_cutoff_len,
        KeyInfo{kData, "encoder-decoders: tokens of a prompt, a longer one loses its end; 0 is no limit of its own"});
  visit("target_cutoff_len", render.target_cutoff_len, KeyInfo{kData, "tokens of an answer; 0 is no limit of its own"});
  visit("train_on_prompt", render.train_on_prompt, KeyInfo{kData, "learn the prompt's tokens, too"});
  visit("prompt_eos", render.prompt_eos,
        KeyInfo{kData,
                "encoder-decoders: prompts end in EOS, as transformers' tokenizers have it; T0 was trained without"});
  visit("on_bad_row", render.on_bad_row,
        KeyInfo{kData,
                "a row that can't be read, or that the template refuses: `stop` names all of them before the first "
                "step; `skip` lists them and leaves them out"});
}

/// The same for what only compositions have.
template <class Config, class Visit>
void each_composition_key(Config& run, Visit visit) {
  visit("train_adapters", run.train_adapters,
        KeyInfo{kSteps, "`calm`: the adapters that the composition's models carry are trained with the connections"});
  visit("state_cache_gib", run.state_cache_gib,
        KeyInfo{kSteps,
                "`calm`: GiB of frozen states (the augmenting models', and the anchor's up to its lowest connection) "
                "that are kept for the next epoch or evaluation; 0 = off. The losses are the same, on the CPU in "
                "float32 bit for bit"});
  visit("state_cache_dir", run.state_cache_dir,
        KeyInfo{kSteps,
                "`calm`: keep them in this folder instead of in memory; it may serve several runs. Nothing in it is "
                "ever removed: what other models left there counts, and with `state_cache_gib` full nothing new is "
                "kept"});
}

/// Keys whose values are read by hand.
std::vector<RunKey> other_keys() {
  const RunConfig run;
  static const std::string kTypes = fmt::format(
      "{}, `full`, `mix`: the routers alone of a MoLoRA whose experts are LoRAs that one has, or `calm`: the "
      "connections of the composition that `model_name_or_path` names",
      fmt::join(
          [] {
            std::vector<std::string> names;
            for (const std::string& name : adapters::method_names()) {
              names.push_back(fmt::format("`{}` ({})", name, adapters::method_of(name).summary));
            }
            return names;
          }(),
          ", "));
  std::vector<RunKey> keys{
      {"model_name_or_path",
       nullptr,
       {kModel,
        "folder with config.json, or a .gguf file; with `init: random` a folder with config.json is enough, or that "
        "file itself"}},
      {"init",
       run.init,
       {kModel,
        "`random`: new weights from config.json alone, for `full`. Normal with deviation 1/sqrt(fan in), divided by "
        "sqrt(2 L) where a matrix writes to the residual stream; embedding 0.1, head 0.02, 0.02 where they are one; "
        "the same for a seed on every device"}},
      {"tokenizer",
       nullptr,
       {kModel,
        "of a new model: a folder, a tokenizer.json or a .gguf file; or `{train: bpe, vocab_size: 2048}`: byte-level "
        "BPE learnt from the run's own training texts (at most 64 MiB of them), every digit a token, `<bos>` `<eos>` "
        "`<pad>`. vocab_size, bos, eos and pad of config.json follow it (a given tokenizer may be smaller than "
        "vocab_size). null is the tokenizer beside config.json. A resumed run keeps the one it began with"}},
      {"finetuning_type", run.finetuning_type, {kModel, kTypes.c_str()}},
      {"adapter_name_or_path",
       nullptr,
       {kModel,
        "start from this adapter's numbers instead of new ones, and with its settings: rank, alpha, targets, experts, "
        "router. A run that says otherwise is an error"}},
      {"adapters",
       Json::array(),
       {kModel,
        "`mix`: folders of LoRAs of this base, PEFT's or ours: the experts, with their ranks, alphas and targets, "
        "which may differ. Or `adapter_name_or_path` names a MoLoRA, as `moesaic mix` makes them, whose routers go on "
        "from where they stand"}},
      {"trainable",
       Json::array(),
       {kModel,
        "`full`: the parts that are trained, of `router`, `experts` (of a sparse model), `attention`, `mlp`, `norms`, "
        "`embeddings`; none named is all"}},
      {"num_experts",
       nullptr,
       {kModel,
        "E; or by layer: `{\"0-7\": 4, \"8-23\": 10}`, which must name every adapted layer; null is 10 for "
        "mixtures, 1 otherwise"}},
      {"lora_target",
       nullptr,
       {kModel,
        "`all-linear`, `reference`, names (`[q_proj, v_proj]`), or one regular expression over whole module paths; "
        "null is the method's default. A name that matches nothing is an error"}},
      {"feedforward_modules",
       nullptr,
       {kModel,
        "(IA)³ and MoV: the names in `lora_target` that scale what they read instead of what they give, or one regular "
        "expression; null takes those that end in `down_proj` or `wo`, `[]` none"}},
      {"layers_to_transform", nullptr, {kModel, "list of layers; null is all"}},
      {"dataset",
       nullptr,
       {kData,
        "a name in `dataset_info.json`, a file or a folder; a list of them, or objects {name, weight, cap, split, "
        "formatting, columns, tags, val_size, templates, prompts}; `prompts` is a templates.yaml of promptsource, its "
        "folder, or a folder of such by the data sets' names, and renders raw rows"}},
      {"dataset_dir",
       nullptr,
       {kData,
        "folder of `dataset_info.json` and of relative names; null is the working folder, or `data` where only that "
        "has a `dataset_info.json`"}},
      {"eval_dataset", nullptr, {kData, "data for evaluation while training, beside that of `val_size`"}},
      {"val_size",
       run.val_size,
       {kData, "of every data set, set aside for evaluation: a share below 1, or a number of rows"}},
      {"max_samples",
       nullptr,
       {kData,
        "rows of every data set at most, those that `val_size` holds out among them, spread evenly over it; null is "
        "all"}},
      {"stage", "sft", {kData, "`sft`; `pt` learns the texts of the data's prompt column, each an example of its own"}},
      {"mixture_rule",
       "proportional",
       {kData,
        "rates of data sets without weights: `proportional` to their rows, `equal`, or `t0`: rows, but 500,000 // "
        "`templates` (with `prompts` their number) where there are more than 500,000"}},
      {"sentence_column", nullptr, {kData, "column with a list of numbers, for `router.sentence_source: column`"}},
      {"packing", true, {kData, "batches are ragged without padding either way"}},
      {"bf16",
       nullptr,
       {kSteps,
        "number format of the frozen model: true bfloat16, false float32, null what the hardware does faster; "
        "run.yaml of the output folder says which it was"}},
      {"fp16", false, {kSteps, "true is refused: float16 overflows in training"}},
      {"device", "auto", {kSteps, "`auto`, `cpu`, `cuda`, `cuda:N`"}},
      {"quantization_bit",
       nullptr,
       {kSteps,
        "nothing else is accepted: the frozen weights stay float. `--quantize int8` is for generation and "
        "evaluation"}},
      {"eval_strategy",
       nullptr,
       {kOutput,
        "`steps`: every `eval_steps`, or `logging_steps` where that is 0; `epoch`; `no`; null is as `eval_steps` "
        "says"}},
      {"save_strategy", nullptr, {kOutput, "`steps`: every `save_steps`; `epoch`; `no`; null is `steps`"}},
      {"output_dir", nullptr, {kOutput, "adapter, tokenizer, `run.yaml`, logs and `checkpoint-N` folders"}},
      {"eval.tasks",
       Json::array(),
       {kOutput,
        "task files, as `moesaic eval` takes them, scored while training and asked as the training data is rendered; "
        "the scores are `eval/<task>/<metric>` on the console, in train_log.jsonl and in TensorBoard"}},
      {"eval.steps", run.train.task_eval_steps, {kOutput, "steps between these evaluations; 0 is at the end only"}},
      {"eval.limit", run.eval_limit, {kOutput, "questions of each task; 0 is all"}},
      {"eval.max_gen_toks", run.eval_max_gen_toks, {kOutput, "tokens of an answer that is generated, at most"}},
      {"report_to",
       run.train.report_to,
       {kOutput,
        "`jsonl` (train_log.jsonl, router_stats.jsonl), `tensorboard` (event files), `none`; services (`wandb`, "
        "`swanlab`, `mlflow`, ...) are passed over with a note: nothing is sent anywhere"}},
  };
  static const std::map<std::string, const char*> kRouterHelp{
      {"type", "`soft`: all experts; `top_k`: the k largest"},
      {"top_k", "k; a value above 0 implies `top_k`"},
      {"topk_mode",
       "`mask`: the kept probabilities as they are (MoV then shrinks activations to about k / E); `renorm`: divided by "
       "their sum; `residual`: MoV scales by 1 + the kept deviations; null is `residual` for MoV, else `mask`"},
      {"input", "what the router reads: `token` (the site's own input), `sentence`, `layer_input`, `ffn_product`"},
      {"sentence_source",
       "for `sentence`: `hidden`, the frozen model's mean last hidden state of the prompt; `column`, numbers of the "
       "data; or the folder of a sentence encoder, a T5 encoder (sentence-T5 among them) whose mean states of the "
       "prompt's text are kept in the user's cache folder"},
      {"sentence_dim", "width of the sentence vector; 0 is the model's"},
      {"init_std", "of the router's start values"},
      {"jitter", "its input is multiplied by uniform(1-j, 1+j) while training"},
      {"temperature", "logits are divided by it"},
      {"logits",
       "`signed`; `absolute`: their magnitude, for router rows whose sign means nothing, as those of `mix --router "
       "arrow`"},
      {"head_wise",
       "MoV at keys, values and queries: a vector and a routing per head, vectors [E, H, k], router [E, k]; false: "
       "over all heads together, vectors [E, H·k], router [E, H·k]"},
      {"dtype", "routers compute in float32; nothing else is accepted"},
  };
  Json router = adapters::router_config_json(run.adapter.router);
  router["dtype"] = "float32";
  router["topk_mode"] = nullptr;
  for (const auto& [key, value] : router.items())
    keys.push_back({"router." + key, value, {kRouter, kRouterHelp.at(key)}});
  return keys;
}

/// Every key with its default as one object; "a.b" is b in a.
const Json& run_defaults() {
  static const Json kDefaults = [] {
    Json json = Json::object();
    for (const RunKey& key : run_keys()) {
      const size_t dot = key.name.find('.');
      if (dot == std::string::npos) {
        json[key.name] = key.value;
      } else {
        json[key.name.substr(0, dot)][key.name.substr(dot + 1)] = key.value;
      }
    }
    return json;
  }();
  return kDefaults;
}

std::vector<std::string> known_keys() {
  std::vector<std::string> keys{"router", "eval", "router.renormalize", "tokenizer.train", "tokenizer.vocab_size"};
  for (const RunKey& key : run_keys()) {
    keys.push_back(key.name);
    if (key.name == "rank_pattern" || key.name == "alpha_pattern" || key.name == "num_experts") {
      keys.push_back(key.name + ".*");
    }
  }
  return keys;
}

}  // namespace

const std::vector<RunKey>& run_keys() {
  static const std::vector<RunKey> kKeys = [] {
    std::vector<RunKey> keys = other_keys();
    const RunConfig run;
    auto add = [&](const char* key, const auto& field, const KeyInfo& info) { keys.push_back({key, field, info}); };
    each_adapter_key(run.adapter, add);
    each_render_key(run.render, add);
    train::each_train_key(run.train, add);
    each_composition_key(run, add);
    return keys;
  }();
  return kKeys;
}

std::string run_keys_markdown() {
  static const std::set<std::string> kRequired{"model_name_or_path", "dataset", "output_dir"};
  std::string text;
  for (const char* section : {kModel, kRouter, kData, kSteps, kOutput}) {
    text += fmt::format("## {}\n\n| key | default | |\n|---|---|---|\n", section);
    for (const RunKey& key : run_keys()) {
      if (std::string_view(key.info.section) != section) continue;
      std::string value = key.value.dump();
      if (key.value.is_string() && key.value != "") value = fmt::format("`{}`", key.value.get<std::string>());
      if (key.value.is_number_float()) value = fmt::format("{:g}", key.value.get<double>());
      text += fmt::format("| `{}` | {} | {} |\n", key.name, kRequired.contains(key.name) ? "required" : value,
                          key.info.help);
    }
    text += "\n";
  }
  return text + foreign_keys_markdown();
}

OrderedJson read_run(const fs::path& file, const std::vector<std::string>& overrides) {
  OrderedJson run = read_yaml(file);
  if (run.is_object()) run = with_aliases(std::move(run), file.string());
  std::vector<std::string> canonical;
  for (const std::string& text : overrides) {
    const std::string key = text.substr(0, text.find_first_of(".="));
    canonical.push_back(key_of(key, "'" + text + "'") + text.substr(key.size()));
    if (!canonical.back().starts_with("router.renormalize=")) continue;
    OrderedJson router;
    apply_overrides(router, {canonical.back()});
    canonical.back() = "router.topk_mode=" + with_aliases(router, text)["router"]["topk_mode"].get<std::string>();
  }
  apply_overrides(run, canonical);
  return run;
}

namespace {

/// What is wrong with a run, collected so that all of it is said at once.
class Problems {
 public:
  explicit Problems(std::string where) : where_(std::move(where)) {}

  /// Runs `read`; what it refuses of the run is noted.
  template <class Read>
  void attempt(Read read) {
    try {
      read();
    } catch (const ConfigError& error) {
      note(error.what());
    } catch (const UsageError& error) {
      note(error.what());
    }
  }
  void note(std::string problem) {
    for (const std::string& prefix : {where_ + ": ", std::string("run config: ")}) {
      if (problem.starts_with(prefix)) problem.erase(0, prefix.size());
    }
    problems_.push_back(std::move(problem));
  }
  bool empty() const { return problems_.empty(); }
  /// Throws UsageError when there is any: a run's keys are the user's words.
  void settle() const {
    if (problems_.empty()) return;
    if (problems_.size() == 1) throw UsageError(fmt::format("{}: {}", where_, problems_[0]));
    throw UsageError(
        fmt::format("{}: {} things are wrong:\n  {}", where_, problems_.size(), fmt::join(problems_, "\n  ")));
  }

 private:
  std::string where_;
  std::vector<std::string> problems_;
};

/// "steps", "epoch", "no" or "" (none given); YAML 1.1's `no` is false.
std::string parse_strategy(const Json& json, const char* key, const std::string& where) {
  if (json.at(key) == false) return "no";
  const auto strategy = get_or<std::string>(json, key, "", where);
  MOESAIC_CHECK(strategy.empty() || strategy == "steps" || strategy == "epoch" || strategy == "no", UsageError,
                "{}: {}: got '{}', expected steps, epoch or no", where, key, strategy);
  return strategy;
}

/// eval_strategy, save_strategy: what they say of eval_steps and save_steps.
void settle_strategies(const std::string& where, Json& json, RunConfig& run) {
  train::TrainConfig& train = run.train;
  const std::string eval = parse_strategy(json, "eval_strategy", where);
  const std::string save = parse_strategy(json, "save_strategy", where);
  run.eval_each_epoch = eval == "epoch";
  run.save_each_epoch = save == "epoch";
  if (eval == "no") train.eval_steps = 0;
  if (eval == "steps" && train.eval_steps == 0) train.eval_steps = train.logging_steps;
  if (save == "no") train.save_steps = 0;
  MOESAIC_CHECK((!run.eval_each_epoch && !run.save_each_epoch) || train.max_batch_tokens == 0, UsageError,
                "{}: eval_strategy, save_strategy: got epoch with max_batch_tokens, expected steps: how many steps an "
                "epoch has is not known before",
                where);
  json["eval_steps"] = train.eval_steps;
  json["save_steps"] = train.save_steps;
}

/// report_to, less the services that nothing is sent to.
std::vector<std::string> parse_report_to(const Json& json, const std::string& where) {
  static const std::set<std::string> kServices{"wandb",   "swanlab", "mlflow",  "comet_ml",  "neptune",
                                               "trackio", "clearml", "dvclive", "codecarbon"};
  std::vector<std::string> targets = names(json, "report_to", where), services;
  std::erase_if(targets, [&](const std::string& target) {
    if (kServices.contains(target)) services.push_back(target);
    return kServices.contains(target);
  });
  if (services.empty()) return targets;
  spdlog::info("{}: report_to: {}: nothing is sent anywhere; train_log.jsonl has the figures", where,
               fmt::join(services, ", "));
  if (targets.empty()) targets.emplace_back("jsonl");
  return targets;
}

/// topk_mode null: residual for MoV, whose scales the other modes would shrink; else mask.
void settle_topk_mode(const Subject* subject, const std::string& where, Json& json, adapters::AdapterConfig& adapter) {
  const bool scales = subject != nullptr && subject->method != nullptr && !subject->method->low_rank;
  adapters::RouterConfig& router = adapter.router;
  if (json["router"].is_object() && json["router"]["topk_mode"].is_null()) {
    router.topk_mode = scales && router.type == "top_k" ? "residual" : "mask";
    json["router"]["topk_mode"] = router.topk_mode;
  }
  if (!scales || router.type != "top_k" || router.topk_mode != "mask" || router.top_k >= adapter.num_experts) return;
  spdlog::warn(
      "{}: router.topk_mode: mask with {} keeps about {:.2f} of every scale at the start ({} of {} experts), and the "
      "activations shrink as much; residual and renorm keep their size",
      where, adapter.method, static_cast<double>(router.top_k) / static_cast<double>(adapter.num_experts), router.top_k,
      adapter.num_experts);
}

}  // namespace

RunConfig parse_run_config(const OrderedJson& given, const std::string& where) {
  MOESAIC_CHECK(given.is_object(), UsageError, "{}: got {}, expected keys and values", where, given.type_name());
  Problems problems(where);
  OrderedJson user = given;
  problems.attempt([&] { user = with_aliases(given, where); });
  std::vector<std::string> refused;
  const std::vector<std::string> passed_over = take_foreign_keys(user, refused);
  if (!passed_over.empty()) spdlog::info("{}: passed over: {}", where, fmt::join(passed_over, ", "));
  for (std::string& each : refused) problems.note(std::move(each));
  problems.attempt([&] { check_known_keys(user, known_keys(), where); });
  if (user.contains("resume_from_checkpoint") && user["resume_from_checkpoint"].is_boolean()) {
    user["resume_from_checkpoint"] = user["resume_from_checkpoint"] == true ? "auto" : "none";
  }

  OrderedJson settled = run_defaults();
  settled.merge_patch(user);
  for (const auto& [key, value] : run_defaults().items()) {
    if (!settled.contains(key)) settled[key] = value;  // an explicit null means the default
  }
  problems.attempt([&] { take_adapter_settings(user, where, settled); });
  for (const auto& [key, value] : run_defaults().items()) {
    if (!settled.contains(key)) settled[key] = value;
  }
  Json json = settled;  // for reading

  RunConfig run;
  const Subject* subject = nullptr;
  auto& adapter = run.adapter;
  auto& train = run.train;
  auto read = [&](const char* key, auto& field, const KeyInfo&) {
    problems.attempt([&] { field = get<std::remove_reference_t<decltype(field)>>(json, key, where); });
  };
  auto take = [&](const char* key, auto& field) { read(key, field, KeyInfo{}); };
  take("model_name_or_path", run.model_name_or_path);
  run.dataset = json.at("dataset");
  if (run.dataset.is_null()) problems.note("key 'dataset' is missing");
  take("output_dir", train.output_dir);
  take("init", run.init);
  if (run.init != "pretrained" && run.init != "random") {
    problems.note(fmt::format("init: got '{}', expected pretrained or random", run.init));
  }
  take("finetuning_type", run.finetuning_type);
  problems.attempt([&] { subject = &subject_of(run.finetuning_type); });
  problems.attempt([&] { run.adapter_name_or_path = get_or<std::string>(json, "adapter_name_or_path", "", where); });
  problems.attempt([&] { parse_tokenizer(json.at("tokenizer"), where + ": tokenizer", run); });

  adapter.method = subject != nullptr && subject->method != nullptr ? subject->method->name : run.finetuning_type;
  problems.attempt([&] {
    run.adapters = names(json, "adapters", where);
    MOESAIC_CHECK(run.adapters.empty() || run.finetuning_type == kMix, UsageError,
                  "{}: adapters: got {} for {}, expected finetuning_type {}, or none\nhint: adapter_name_or_path names "
                  "the one that a run begins with",
                  where, json["adapters"].dump(), run.finetuning_type, kMix);
  });
  problems.attempt([&] {
    run.trainable = names(json, "trainable", where);
    MOESAIC_CHECK(run.trainable.empty() || run.finetuning_type == "full", UsageError,
                  "{}: trainable: got {} for {}, expected finetuning_type full: an adapter is trained whole", where,
                  json["trainable"].dump(), run.finetuning_type);
    for (const std::string& part : run.trainable) {
      const auto* const known = std::end(models::kTrainableParts);
      MOESAIC_CHECK(std::find(std::begin(models::kTrainableParts), known, part) != known, UsageError,
                    "{}: trainable: got '{}', expected some of {}", where, part,
                    fmt::join(models::kTrainableParts, ", "));
    }
  });
  each_adapter_key(adapter, read);
  each_render_key(run.render, read);
  problems.attempt([&] { data::check_options(run.render); });
  train::each_train_key(train, read);
  each_composition_key(run, read);
  problems.attempt(
      [&] { adapter.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where); });
  const bool mixture = subject != nullptr && subject->method != nullptr && subject->method->mixes;
  if (json.at("num_experts").is_null()) json["num_experts"] = mixture ? 10 : 1;
  problems.attempt([&] {
    adapters::parse_experts(json.at("num_experts"), where + ": num_experts", adapter);
    MOESAIC_CHECK(subject == nullptr || subject->method != nullptr || adapter.num_experts == 1, UsageError,
                  "{}: num_experts: got {} for {}, which has no experts\nhint: leave the key out, or num_experts=null",
                  where, json["num_experts"].dump(), run.finetuning_type);
    MOESAIC_CHECK(subject == nullptr || mixture || adapter.num_experts == 1, UsageError,
                  "{}: num_experts: got {} for {}, which has one expert\nhint: finetuning_type {} mixes experts", where,
                  json["num_experts"].dump(), run.finetuning_type,
                  subject->method != nullptr && !subject->method->low_rank ? "mov" : "molora");
  });
  problems.attempt([&] { adapter.router = parse_router(json.at("router"), where + ": router"); });
  settle_topk_mode(subject, where, json, adapter);
  problems.attempt([&] { parse_target(json, where, run); });
  if (subject != nullptr) problems.attempt([&] { parse_feedforward(json, where, run); });
  if (subject != nullptr && subject->method != nullptr) {
    problems.attempt([&] { adapters::validate(adapter, where); });
  }
  run.eval_dataset = json.at("eval_dataset");
  problems.attempt([&] { run.dataset_dir = get_or<std::string>(json, "dataset_dir", "", where); });
  if (run.dataset_dir.empty()) {
    constexpr const char* kRegistry = "dataset_info.json";
    run.dataset_dir = !fs::exists(kRegistry) && fs::exists(fs::path("data") / kRegistry) ? "data" : ".";
    json["dataset_dir"] = run.dataset_dir;
  }
  take("val_size", run.val_size);
  problems.attempt([&] {
    run.max_samples = get_or<int64_t>(json, "max_samples", 0, where);
    MOESAIC_CHECK(json.at("max_samples").is_null() || run.max_samples > 0, UsageError,
                  "{}: max_samples: got {}, expected a number from 1", where, run.max_samples);
  });
  problems.attempt([&] {
    const auto stage = get<std::string>(json, "stage", where);
    MOESAIC_CHECK(stage == "sft" || stage == "pt", UsageError,
                  "{}: stage: got '{}', expected sft or pt: nothing is learnt of preferences here", where, stage);
    run.pretraining = stage == "pt";
  });
  take("mixture_rule", run.mixture_rule);
  problems.attempt([&] { data::check_mixture_rule(run.mixture_rule); });
  problems.attempt([&] { run.render.sentence_column = get_or<std::string>(json, "sentence_column", "", where); });
  problems.attempt([&] {
    if (!get<bool>(json, "packing", where)) {
      spdlog::info("{}: packing: batches are ragged, without padding, either way", where);
    }
  });

  if (train.optim.starts_with("adamw_torch") || train.optim == "adamw_hf") train.optim = "adamw";
  if (train.lr_scheduler_type == "constant_with_warmup") train.lr_scheduler_type = "constant";
  problems.attempt([&] { json["report_to"] = train.report_to = parse_report_to(json, where); });
  problems.attempt([&] { parse_eval(json.at("eval"), where + ": eval", run); });
  problems.attempt([&] { settle_strategies(where, json, run); });
  problems.attempt([&] {
    train::TrainConfig at_all = train;
    if (run.eval_each_epoch) at_all.eval_steps = 1;
    if (run.save_each_epoch) at_all.save_steps = 1;
    train::check_config(at_all, /*epoch_size=*/1);
  });

  problems.attempt([&] {
    MOESAIC_CHECK(!get<bool>(json, "fp16", where), UsageError,
                  "{}: fp16: got true, expected false: float16 overflows in training\nhint: bf16=true", where);
  });
  if (!json.at("quantization_bit").is_null()) {
    problems.note(fmt::format(
        "quantization_bit: got {}, expected null: gradients pass through the frozen weights, which stay float here\n"
        "hint: --quantize int8 makes the model small for generate and eval",
        json.at("quantization_bit").dump()));
  }
  take("device", run.device);
  problems.attempt([&] { parse_device(run.device); });
  problems.attempt([&] {
    run.dtype = json.at("bf16").is_null() ? "auto" : get<bool>(json, "bf16", where) ? "bfloat16" : "float32";
  });
  if (!std::isfinite(run.state_cache_gib) || run.state_cache_gib < 0) {
    problems.note(fmt::format("state_cache_gib must not be negative: got {}", run.state_cache_gib));
  }
  if (subject != nullptr && subject->check != nullptr) problems.attempt([&] { subject->check(run, where); });
  problems.settle();
  run.resolved = json;
  for (const char* key : {"rank_pattern", "alpha_pattern"}) run.resolved[key] = settled[key];
  settled.at("rank_pattern").get_to(adapter.rank_pattern);  // in the file's order
  settled.at("alpha_pattern").get_to(adapter.alpha_pattern);
  return run;
}

}  // namespace moesaic::run
