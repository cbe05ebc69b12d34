#include "moesaic/run/config.h"

#include <regex>

#include "moesaic/adapters/replacements.h"
#include "moesaic/base/yaml.h"
#include "moesaic/formats/adapter_folder.h"
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
    {"router_aux_loss_coef", "moe_aux_loss_coef"},
    {"mix_strategy", "mixture_rule"},
};

OrderedJson with_aliases(OrderedJson json, const std::string& where) {
  for (const auto& [alias, key] : kAliases) {
    auto found = json.find(alias);
    if (found == json.end()) continue;
    MOESAIC_CHECK(!json.contains(key), UsageError, "{}: got both '{}' and '{}', which mean the same; give one", where,
                  alias, key);
    spdlog::info("{}: '{}' is read as '{}'", where, alias, key);
    OrderedJson value = *found;
    json.erase(alias);
    json[key] = std::move(value);
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

adapters::RouterConfig parse_router(Json router, const std::string& where) {
  MOESAIC_CHECK(router.is_object(), UsageError, "{}: got {}, expected keys and values", where, router.dump());
  if (auto found = router.find("renormalize"); found != router.end()) {
    router["topk_mode"] = get<bool>(router, "renormalize", where) ? "renorm" : "mask";
    router.erase("renormalize");
  }
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

/// eval: {tasks, steps, limit}: task files to score while training.
void parse_eval(const Json& json, const std::string& where, RunConfig& run) {
  MOESAIC_CHECK(json.is_object(), UsageError, "{}: got {}, expected keys and values", where, json.dump());
  run.eval_tasks = names(json, "tasks", where);
  run.train.task_eval_steps = get_or<int64_t>(json, "steps", 0, where);
  run.eval_limit = get_or<int64_t>(json, "limit", 0, where);
  MOESAIC_CHECK(run.train.task_eval_steps >= 0 && run.eval_limit >= 0, UsageError,
                "{}: got steps {} and limit {}, expected numbers from 0", where, run.train.task_eval_steps,
                run.eval_limit);
  MOESAIC_CHECK(!run.eval_tasks.empty() || (run.train.task_eval_steps == 0 && run.eval_limit == 0), UsageError,
                "{}: got no tasks, expected files to score every {} steps", where, run.train.task_eval_steps);
}

/// What an adapter's folder says in a run's words. `silent` are those keys of it that no tensor's shape shows: a run
/// that says otherwise would compute something else, and nothing would tell.
struct AdapterKeys {
  OrderedJson values = OrderedJson::object();
  std::vector<std::string> silent;
};

AdapterKeys adapter_keys(const fs::path& dir) {
  const formats::AdapterFolder folder = formats::read_adapter_folder(dir);
  const adapters::AdapterConfig config = adapters::parse_adapter_config(folder, (dir / "adapter_config.json").string());
  std::vector<std::string> frozen;
  if (config.use_dora) frozen.emplace_back("use_dora");
  for (const auto& [name, tensor] : folder.tensors) {
    if (adapters::acts_whole(name) && frozen.size() < 4) frozen.push_back(name);
  }
  MOESAIC_CHECK(frozen.empty(), UsageError,
                "{}: got an adapter with {} for a run to begin with, expected one without: what acts through a weight "
                "of the model as a whole is used, not trained\nhint: `moesaic merge` it into its base and begin there",
                dir.string(), fmt::join(frozen, ", "));
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
      const size_t end = std::min({name.find(".lora_"), name.find(".ia3_l"), name.find(".mov.")});
      if (end != std::string::npos) sites.insert(name.substr(0, end));
    }
    values["lora_target"] = sites;
    for (const std::string& site : sites) {
      if (config.rank_at(site) != config.lora_rank) values["rank_pattern"][site] = config.rank_at(site);
    }
  }
  if (config.num_experts > 1) {
    values["router"] = adapters::router_config_json(config.router);
    for (const char* key :
         {"type", "top_k", "topk_mode", "input", "sentence_dim", "sentence_source", "temperature", "head_wise"}) {
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

/// A run that begins with an adapter's numbers has its settings, too. What `user` says otherwise is an error, or, when
/// the run goes on with a checkpoint, said and done.
void take_adapter_settings(const OrderedJson& user, const std::string& where, OrderedJson& json) {
  const std::string type = json.at("finetuning_type").is_string() ? json["finetuning_type"].get<std::string>() : "";
  const std::vector<std::string> methods = adapters::method_names();
  if (std::find(methods.begin(), methods.end(), type) == methods.end()) return;
  const auto begun = adapter_begun(json, where);
  if (!begun) return;
  const auto& [dir, resumed] = *begun;
  AdapterKeys keys = adapter_keys(dir);
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
    if (router.contains("renormalize")) router["topk_mode"] = nullptr;
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
    spdlog::warn("{}: was made with other settings than this run's, which it goes on with: {}", dir.string(),
                 fmt::join(differences, "; "));
  }
  MOESAIC_CHECK(differences.empty() || resumed, UsageError,
                "{}: the run begins with the adapter {}, whose numbers mean something else with other settings: {}\n"
                "hint: leave these keys out, and the adapter's own are taken",
                where, dir.string(), fmt::join(differences, "; "));
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

/// The same for data::RenderOptions.
template <class Config, class Visit>
void each_render_key(Config& render, Visit visit) {
  visit("template", render.template_name,
        KeyInfo{kData,
                "`auto`: the model's chat templates, if it has any; `none`: raw text; the name of one of them; or a "
                "Jinja file"});
  visit("cutoff_len", render.cutoff_len,
        KeyInfo{kData, "tokens of an example; a longer one loses the middle of its prompt first"});
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
  static const std::string kTypes =
      fmt::format("{}, `full`, or `calm`: the connections of the composition that `model_name_or_path` names",
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
        "formatting, columns, tags, val_size, templates}"}},
      {"dataset_dir", ".", {kData, "folder of `dataset_info.json` and of relative names"}},
      {"eval_dataset", nullptr, {kData, "data for evaluation while training, beside that of `val_size`"}},
      {"val_size",
       run.val_size,
       {kData, "of every data set, set aside for evaluation: a share below 1, or a number of rows"}},
      {"mixture_rule",
       "proportional",
       {kData, "rates of data sets without weights: `proportional` to their rows, `equal`, or `t0`"}},
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
      {"output_dir", nullptr, {kOutput, "adapter, tokenizer, `run.yaml`, logs and `checkpoint-N` folders"}},
      {"eval.tasks",
       Json::array(),
       {kOutput,
        "task files, as `moesaic eval` takes them, scored while training and asked as the training data is rendered; "
        "the scores are `eval/<task>/<metric>` on the console, in train_log.jsonl and in TensorBoard"}},
      {"eval.steps", run.train.task_eval_steps, {kOutput, "steps between these evaluations; 0 is at the end only"}},
      {"eval.limit", run.eval_limit, {kOutput, "questions of each task; 0 is all"}},
      {"report_to",
       run.train.report_to,
       {kOutput, "`jsonl` (train_log.jsonl, router_stats.jsonl), `tensorboard` (event files)"}},
  };
  static const std::map<std::string, const char*> kRouterHelp{
      {"type", "`soft`: all experts; `top_k`: the k largest"},
      {"top_k", "k; a value above 0 implies `top_k`"},
      {"topk_mode",
       "`mask`: the kept probabilities as they are; `renorm`: divided by their sum; `residual`: MoV scales by 1 + the "
       "kept deviations"},
      {"input", "what the router reads: `token` (the site's own input), `sentence`, `layer_input`, `ffn_product`"},
      {"sentence_source",
       "for `sentence`: the frozen model's mean last hidden state of the prompt, or a `column` of the data"},
      {"sentence_dim", "width of the sentence vector; 0 is the model's"},
      {"init_std", "of the router's start values"},
      {"jitter", "its input is multiplied by uniform(1-j, 1+j) while training"},
      {"temperature", "logits are divided by it"},
      {"head_wise",
       "MoV at keys, values and queries: a vector and a routing per head, vectors [E, H, k], router [E, k]; false: "
       "over all heads together, vectors [E, H·k], router [E, H·k]"},
      {"dtype", "routers compute in float32; nothing else is accepted"},
  };
  Json router = adapters::router_config_json(run.adapter.router);
  router["dtype"] = "float32";
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
  text.pop_back();
  return text;
}

RunConfig parse_run_config(const OrderedJson& given, const std::string& where) {
  MOESAIC_CHECK(given.is_object(), UsageError, "{}: got {}, expected keys and values", where, given.type_name());
  const OrderedJson user = with_aliases(given, where);
  check_known_keys(user, known_keys(), where);
  OrderedJson settled = run_defaults();
  settled.merge_patch(user);
  for (const auto& [key, value] : run_defaults().items()) {
    if (!settled.contains(key)) settled[key] = value;  // an explicit null means the default
  }
  take_adapter_settings(user, where, settled);
  for (const auto& [key, value] : run_defaults().items()) {
    if (!settled.contains(key)) settled[key] = value;
  }
  Json json = settled;  // for reading

  RunConfig run;
  try {
    run.model_name_or_path = get<std::string>(json, "model_name_or_path", where);
    run.dataset = json.at("dataset");
    MOESAIC_CHECK(!run.dataset.is_null(), UsageError, "{}: key 'dataset' is missing", where);
    run.train.output_dir = get<std::string>(json, "output_dir", where);
    run.init = get<std::string>(json, "init", where);
    MOESAIC_CHECK(run.init == "pretrained" || run.init == "random", UsageError,
                  "{}: init: got '{}', expected pretrained or random", where, run.init);
    run.finetuning_type = get<std::string>(json, "finetuning_type", where);
    const Subject& subject = subject_of(run.finetuning_type);
    run.adapter_name_or_path = get_or<std::string>(json, "adapter_name_or_path", "", where);
    parse_tokenizer(json.at("tokenizer"), where + ": tokenizer", run);

    auto& adapter = run.adapter;
    adapter.method = run.finetuning_type;
    auto read = [&](const char* key, auto& field, const KeyInfo&) {
      field = get<std::remove_reference_t<decltype(field)>>(json, key, where);
    };
    each_adapter_key(adapter, read);
    settled.at("rank_pattern").get_to(adapter.rank_pattern);  // in the file's order
    settled.at("alpha_pattern").get_to(adapter.alpha_pattern);
    each_render_key(run.render, read);
    MOESAIC_CHECK(run.render.on_bad_row == "stop" || run.render.on_bad_row == "skip", UsageError,
                  "{}: on_bad_row: got '{}', expected stop or skip", where, run.render.on_bad_row);
    train::each_train_key(run.train, read);
    each_composition_key(run, read);
    adapter.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where);
    const bool mixture = subject.method != nullptr && subject.method->mixes;
    if (json.at("num_experts").is_null()) json["num_experts"] = mixture ? 10 : 1;
    adapters::parse_experts(json.at("num_experts"), where + ": num_experts", adapter);
    MOESAIC_CHECK(mixture || adapter.num_experts == 1, UsageError,
                  "{}: num_experts: got {} for {}, which has one expert\nhint: finetuning_type {} mixes experts", where,
                  json["num_experts"].dump(), run.finetuning_type,
                  subject.method != nullptr && !subject.method->low_rank ? "mov" : "molora");
    adapter.router = parse_router(json.at("router"), where + ": router");
    parse_target(json, where, run);
    parse_feedforward(json, where, run);
    if (subject.method != nullptr) adapters::validate(adapter, where);
    run.eval_dataset = json.at("eval_dataset");
    run.dataset_dir = get<std::string>(json, "dataset_dir", where);
    run.val_size = get<double>(json, "val_size", where);
    run.mixture_rule = get<std::string>(json, "mixture_rule", where);
    run.render.sentence_column = get_or<std::string>(json, "sentence_column", "", where);
    if (!get<bool>(json, "packing", where)) {
      spdlog::info("{}: packing: batches are ragged, without padding, either way", where);
    }

    auto& train = run.train;
    if (train.optim == "adamw_torch") train.optim = "adamw";
    if (train.lr_scheduler_type == "constant_with_warmup") train.lr_scheduler_type = "constant";
    train.report_to = names(json, "report_to", where);
    parse_eval(json.at("eval"), where + ": eval", run);

    MOESAIC_CHECK(!get<bool>(json, "fp16", where), UsageError,
                  "{}: fp16: got true, expected false: float16 overflows in training\nhint: bf16=true", where);
    MOESAIC_CHECK(json.at("quantization_bit").is_null(), UsageError,
                  "{}: quantization_bit: got {}, expected null: gradients pass through the frozen weights, which stay "
                  "float here\nhint: --quantize int8 makes the model small for generate and eval",
                  where, json.at("quantization_bit").dump());
    run.device = get<std::string>(json, "device", where);
    run.dtype = json.at("bf16").is_null() ? "auto" : get<bool>(json, "bf16", where) ? "bfloat16" : "float32";
    MOESAIC_CHECK(std::isfinite(run.state_cache_gib) && run.state_cache_gib >= 0, UsageError,
                  "{}: state_cache_gib must not be negative: got {}", where, run.state_cache_gib);
    if (subject.check != nullptr) subject.check(run, where);
  } catch (const ConfigError& error) {
    throw UsageError(error.what());  // a run's keys are the user's words
  }
  run.resolved = json;
  for (const char* key : {"rank_pattern", "alpha_pattern"}) run.resolved[key] = settled[key];
  return run;
}

}  // namespace moesaic::run
