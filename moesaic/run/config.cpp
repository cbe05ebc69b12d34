#include "moesaic/train/run_config.h"

#include "moesaic/base/yaml.h"

namespace moesaic::train {
namespace {

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

Json with_aliases(Json json, const std::string& where) {
  for (const auto& [alias, key] : kAliases) {
    auto found = json.find(alias);
    if (found == json.end()) continue;
    MOESAIC_CHECK(!json.contains(key), UsageError, "{}: got both '{}' and '{}', which mean the same; give one", where,
                  alias, key);
    spdlog::info("{}: '{}' is read as '{}'", where, alias, key);
    Json value = *found;
    json.erase(alias);
    json[key] = std::move(value);
  }
  return json;
}

std::vector<std::string> known_keys() {
  std::vector<std::string> keys;
  for (const auto& [key, value] : run_defaults().items()) {
    keys.push_back(key);
    if (key == "rank_pattern" || key == "alpha_pattern" || key == "num_experts") keys.push_back(key + ".*");
    if (key != "router" && key != "eval") continue;
    for (const auto& [inner, inner_value] : value.items()) keys.push_back(key + "." + inner);
  }
  keys.push_back("router.renormalize");
  keys.push_back("tokenizer.train");
  keys.push_back("tokenizer.vocab_size");
  return keys;
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
  MOESAIC_CHECK(run.init == "random" && run.finetuning_type == "full", UsageError,
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

/// lora_target: a preset, a list of names, names separated by commas, or one regex over whole module paths.
void parse_target(const Json& json, const std::string& where, RunConfig& run) {
  const Json& target = json.at("lora_target");
  if (target.is_null()) return;
  if (target.is_array()) {
    run.adapter.targets = get<std::vector<std::string>>(json, "lora_target", where);
    return;
  }
  const auto text = get<std::string>(json, "lora_target", where);
  if (text == "all" || text == "all-linear") {
    run.target_preset = "all-linear";
  } else if (text == "reference") {
    run.target_preset = text;
  } else if (text.find_first_of("*+?[](){}|\\^$") != std::string::npos) {
    run.adapter.targets = text;
  } else {
    run.adapter.targets = split_commas(text);
  }
}

/// feedforward_modules: the (IA)^3 and MoV targets that scale their input; down_proj unless a list says otherwise.
void parse_feedforward(const Json& json, const std::string& where, RunConfig& run) {
  auto& adapter = run.adapter;
  const bool scales = adapter.method == "ia3" || adapter.method == "mov";
  const auto* targets = std::get_if<std::vector<std::string>>(&adapter.targets);
  if (!json.at("feedforward_modules").is_null()) {
    MOESAIC_CHECK(scales && !json.at("lora_target").is_null(), UsageError,
                  "{}: feedforward_modules: got {} for {}, expected it for ia3 and mov, together with lora_target: it "
                  "says which of these scale their input",
                  where, json.at("feedforward_modules").dump(), adapter.method);
    adapter.feedforward = get<std::vector<std::string>>(json, "feedforward_modules", where);
  } else if (scales && targets != nullptr) {
    std::copy_if(targets->begin(), targets->end(), std::back_inserter(adapter.feedforward),
                 [](const std::string& name) { return name.ends_with("down_proj"); });
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

/// visit(key, field) for every key that a field of TrainConfig takes as it stands.
template <class Config, class Visit>
void each_train_key(Config& train, Visit visit) {
  visit("per_device_train_batch_size", train.per_device_train_batch_size);
  visit("max_batch_tokens", train.max_batch_tokens);
  visit("gradient_accumulation_steps", train.gradient_accumulation_steps);
  visit("loss_normalization", train.loss_normalization);
  visit("learning_rate", train.learning_rate);
  visit("router_learning_rate", train.router_learning_rate);
  visit("optim", train.optim);
  visit("weight_decay", train.weight_decay);
  visit("adam_beta1", train.adam_beta1);
  visit("adam_beta2", train.adam_beta2);
  visit("adam_epsilon", train.adam_epsilon);
  visit("adafactor_initial_step", train.adafactor_initial_step);
  visit("lr_scheduler_type", train.lr_scheduler_type);
  visit("warmup_ratio", train.warmup_ratio);
  visit("warmup_steps", train.warmup_steps);
  visit("max_grad_norm", train.max_grad_norm);
  visit("max_steps", train.max_steps);
  visit("num_train_epochs", train.num_train_epochs);
  visit("gradient_checkpointing", train.gradient_checkpointing);
  visit("moe_aux_loss_coef", train.moe_aux_loss_coef);
  visit("router_z_loss_coef", train.router_z_loss_coef);
  visit("train_adapters", train.train_adapters);
  visit("state_cache_gib", train.state_cache_gib);
  visit("state_cache_dir", train.state_cache_dir);
  visit("seed", train.seed);
  visit("deterministic", train.deterministic);
  visit("overwrite_output_dir", train.overwrite_output_dir);
  visit("resume_from_checkpoint", train.resume_from_checkpoint);
  visit("logging_steps", train.logging_steps);
  visit("save_steps", train.save_steps);
  visit("save_total_limit", train.save_total_limit);
  visit("eval_steps", train.eval_steps);
  visit("early_stopping_patience", train.early_stopping_patience);
}

/// The same for AdapterConfig.
template <class Config, class Visit>
void each_adapter_key(Config& adapter, Visit visit) {
  visit("lora_rank", adapter.lora_rank);
  visit("lora_alpha", adapter.lora_alpha);
  visit("lora_dropout", adapter.lora_dropout);
  visit("use_rslora", adapter.use_rslora);
  visit("rank_pattern", adapter.rank_pattern);
  visit("alpha_pattern", adapter.alpha_pattern);
  visit("k_site", adapter.k_site);
}

/// The same for data::RenderOptions.
template <class Config, class Visit>
void each_render_key(Config& render, Visit visit) {
  visit("template", render.template_name);
  visit("cutoff_len", render.cutoff_len);
  visit("target_cutoff_len", render.target_cutoff_len);
  visit("train_on_prompt", render.train_on_prompt);
}

}  // namespace

const Json& run_defaults() {
  static const Json kDefaults = [] {
    const RunConfig run;
    Json router = adapters::router_config_json(run.adapter.router);
    router["dtype"] = "float32";
    Json json{{"model_name_or_path", nullptr},
              {"init", run.init},
              {"tokenizer", nullptr},
              {"finetuning_type", "molora"},
              {"adapter_name_or_path", nullptr},
              {"lora_target", nullptr},
              {"feedforward_modules", nullptr},
              {"layers_to_transform", nullptr},
              {"num_experts", nullptr},
              {"router", router},
              {"quantization_bit", nullptr},
              {"dataset", nullptr},
              {"dataset_dir", "."},
              {"eval_dataset", nullptr},
              {"val_size", run.val_size},
              {"mixture_rule", "proportional"},
              {"sentence_column", nullptr},
              {"packing", true},
              {"bf16", nullptr},
              {"fp16", false},
              {"device", "auto"},
              {"output_dir", nullptr},
              {"eval", {{"tasks", Json::array()}, {"steps", run.train.task_eval_steps}, {"limit", run.eval_limit}}},
              {"report_to", run.train.report_to}};
    auto add = [&](const char* key, const auto& field) { json[key] = field; };
    each_adapter_key(run.adapter, add);
    each_render_key(run.render, add);
    each_train_key(run.train, add);
    return json;
  }();
  return kDefaults;
}

RunConfig parse_run_config(const Json& given, const std::string& where) {
  MOESAIC_CHECK(given.is_object(), UsageError, "{}: got {}, expected keys and values", where, given.type_name());
  const Json user = with_aliases(given, where);
  check_known_keys(user, known_keys(), where);
  Json json = run_defaults();
  json.merge_patch(user);
  for (const auto& [key, value] : run_defaults().items()) {
    if (!json.contains(key)) json[key] = value;  // an explicit null means the default
  }

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
    static const std::vector<std::string> kTypes{"lora", "ia3", "mov", "molora", "calm", "full"};
    MOESAIC_CHECK(std::find(kTypes.begin(), kTypes.end(), run.finetuning_type) != kTypes.end(), UsageError,
                  "{}: finetuning_type: got '{}', expected one of {}", where, run.finetuning_type,
                  fmt::join(kTypes, ", "));
    run.adapter_name_or_path = get_or<std::string>(json, "adapter_name_or_path", "", where);
    parse_tokenizer(json.at("tokenizer"), where + ": tokenizer", run);

    auto& adapter = run.adapter;
    adapter.method = run.finetuning_type;
    auto read = [&](const char* key, auto& field) {
      field = get<std::remove_reference_t<decltype(field)>>(json, key, where);
    };
    each_adapter_key(adapter, read);
    each_render_key(run.render, read);
    each_train_key(run.train, read);
    adapter.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where);
    const bool mixture = run.finetuning_type == "mov" || run.finetuning_type == "molora";
    if (json.at("num_experts").is_null()) json["num_experts"] = mixture ? 10 : 1;
    adapters::parse_experts(json.at("num_experts"), where + ": num_experts", adapter);
    MOESAIC_CHECK(mixture || adapter.num_experts == 1, UsageError,
                  "{}: num_experts: got {} for {}, which has one expert\nhint: finetuning_type {} mixes experts", where,
                  json["num_experts"].dump(), run.finetuning_type, run.finetuning_type == "ia3" ? "mov" : "molora");
    adapter.router = parse_router(json.at("router"), where + ": router");
    parse_target(json, where, run);
    parse_feedforward(json, where, run);
    if (run.finetuning_type != "full" && run.finetuning_type != "calm") adapters::validate(adapter, where);
    MOESAIC_CHECK(
        run.finetuning_type != "calm" || (run.init == "pretrained" && run.adapter_name_or_path.empty()), UsageError,
        "{}: finetuning_type calm trains the connections of the folder that model_name_or_path names: got init "
        "{} and adapter_name_or_path '{}', expected pretrained and none",
        where, run.init, run.adapter_name_or_path);

    MOESAIC_CHECK(run.finetuning_type == "calm" || (!run.train.train_adapters && run.train.state_cache_dir.empty()),
                  UsageError, "{}: train_adapters, state_cache_dir: got them for {}, expected finetuning_type calm",
                  where, run.finetuning_type);

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
    if (run.finetuning_type == "full") {
      MOESAIC_CHECK(run.dtype != "bfloat16", UsageError,
                    "{}: bf16: got true, expected false for full fine-tuning, whose weights must hold small updates",
                    where);
      run.dtype = "float32";
    }
  } catch (const ConfigError& error) {
    throw UsageError(error.what());  // a run's keys are the user's words
  }
  run.resolved = json;
  return run;
}

}  // namespace moesaic::train
