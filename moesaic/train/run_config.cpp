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
    if (key == "rank_pattern" || key == "alpha_pattern") keys.push_back(key + ".*");
    if (key != "router") continue;
    for (const auto& [router_key, router_value] : value.items()) keys.push_back("router." + router_key);
    keys.push_back("router.renormalize");
  }
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

adapters::RouterConfig parse_router(Json router, const std::string& where) {
  if (auto found = router.find("renormalize"); found != router.end()) {
    router["topk_mode"] = get<bool>(router, "renormalize", where) ? "renorm" : "mask";
    router.erase("renormalize");
  }
  auto config = adapters::parse_router_config(router, where);
  if (config.top_k > 0) config.type = "top_k";
  return config;
}

std::vector<std::string> parse_report_to(const Json& json, const std::string& where) {
  const Json& value = json.at("report_to");
  if (value.is_string()) return split_commas(value.get<std::string>());
  return get_or<std::vector<std::string>>(json, "report_to", {}, where);
}

}  // namespace

const Json& run_defaults() {
  static const Json kDefaults = [] {
    const TrainConfig train;
    const adapters::AdapterConfig adapter;
    const data::RenderOptions render;
    return Json{
        {"model_name_or_path", nullptr},
        {"init", "pretrained"},
        {"finetuning_type", "molora"},
        {"adapter_name_or_path", nullptr},
        {"lora_rank", adapter.lora_rank},
        {"lora_alpha", adapter.lora_alpha},
        {"lora_dropout", adapter.lora_dropout},
        {"lora_target", nullptr},
        {"feedforward_modules", nullptr},
        {"use_rslora", adapter.use_rslora},
        {"rank_pattern", Json::object()},
        {"alpha_pattern", Json::object()},
        {"layers_to_transform", nullptr},
        {"k_site", adapter.k_site},
        {"num_experts", nullptr},
        {"router", adapters::router_config_json(adapter.router)},
        {"moe_aux_loss_coef", train.moe_aux_loss_coef},
        {"router_z_loss_coef", train.router_z_loss_coef},
        {"dataset", nullptr},
        {"dataset_dir", "."},
        {"eval_dataset", nullptr},
        {"val_size", 0.0},
        {"mixture_rule", "proportional"},
        {"template", render.template_name},
        {"cutoff_len", render.cutoff_len},
        {"target_cutoff_len", render.target_cutoff_len},
        {"train_on_prompt", render.train_on_prompt},
        {"sentence_column", nullptr},
        {"packing", true},
        {"per_device_train_batch_size", train.per_device_train_batch_size},
        {"max_batch_tokens", train.max_batch_tokens},
        {"gradient_accumulation_steps", train.gradient_accumulation_steps},
        {"loss_normalization", train.loss_normalization},
        {"learning_rate", train.learning_rate},
        {"router_learning_rate", train.router_learning_rate},
        {"optim", train.optim},
        {"weight_decay", train.weight_decay},
        {"adam_beta1", train.adam_beta1},
        {"adam_beta2", train.adam_beta2},
        {"adam_epsilon", train.adam_epsilon},
        {"adafactor_initial_step", train.adafactor_initial_step},
        {"lr_scheduler_type", train.lr_scheduler_type},
        {"warmup_ratio", train.warmup_ratio},
        {"warmup_steps", train.warmup_steps},
        {"max_grad_norm", train.max_grad_norm},
        {"max_steps", train.max_steps},
        {"num_train_epochs", train.num_train_epochs},
        {"gradient_checkpointing", train.gradient_checkpointing},
        {"bf16", nullptr},
        {"fp16", false},
        {"device", "auto"},
        {"seed", train.seed},
        {"output_dir", nullptr},
        {"overwrite_output_dir", train.overwrite_output_dir},
        {"resume_from_checkpoint", train.resume_from_checkpoint},
        {"logging_steps", train.logging_steps},
        {"save_steps", train.save_steps},
        {"save_total_limit", train.save_total_limit},
        {"eval_steps", train.eval_steps},
        {"early_stopping_patience", train.early_stopping_patience},
        {"report_to", train.report_to},
    };
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
    static const std::vector<std::string> kTypes{"lora", "ia3", "mov", "molora", "full"};
    MOESAIC_CHECK(std::find(kTypes.begin(), kTypes.end(), run.finetuning_type) != kTypes.end(), UsageError,
                  "{}: finetuning_type: got '{}', expected one of {}", where, run.finetuning_type,
                  fmt::join(kTypes, ", "));
    run.adapter_name_or_path = get_or<std::string>(json, "adapter_name_or_path", "", where);

    auto& adapter = run.adapter;
    adapter.method = run.finetuning_type;
    adapter.lora_rank = get<int64_t>(json, "lora_rank", where);
    adapter.lora_alpha = get<double>(json, "lora_alpha", where);
    adapter.lora_dropout = get<double>(json, "lora_dropout", where);
    adapter.use_rslora = get<bool>(json, "use_rslora", where);
    adapter.rank_pattern = get<std::map<std::string, int64_t>>(json, "rank_pattern", where);
    adapter.alpha_pattern = get<std::map<std::string, double>>(json, "alpha_pattern", where);
    adapter.layers_to_transform = get_or<std::vector<int64_t>>(json, "layers_to_transform", {}, where);
    adapter.k_site = get<std::string>(json, "k_site", where);
    const bool mixture = run.finetuning_type == "mov" || run.finetuning_type == "molora";
    adapter.num_experts = get_or<int64_t>(json, "num_experts", mixture ? 10 : 1, where);
    json["num_experts"] = adapter.num_experts;
    MOESAIC_CHECK(mixture || adapter.num_experts == 1, UsageError,
                  "{}: num_experts: got {} for {}, which has one expert\nhint: finetuning_type {} mixes experts", where,
                  adapter.num_experts, run.finetuning_type, run.finetuning_type == "ia3" ? "mov" : "molora");
    adapter.router = parse_router(json.at("router"), where + ": router");
    parse_target(json, where, run);
    adapter.feedforward = get_or<std::vector<std::string>>(json, "feedforward_modules", {}, where);
    if (adapter.feedforward.empty() && (adapter.method == "ia3" || adapter.method == "mov")) {
      if (const auto* names = std::get_if<std::vector<std::string>>(&adapter.targets)) {
        std::copy_if(names->begin(), names->end(), std::back_inserter(adapter.feedforward),
                     [](const std::string& name) { return name.ends_with("down_proj"); });
      }
    }

    run.eval_dataset = json.at("eval_dataset");
    run.dataset_dir = get<std::string>(json, "dataset_dir", where);
    run.val_size = get<double>(json, "val_size", where);
    run.mixture_rule = get<std::string>(json, "mixture_rule", where);
    run.render.template_name = get<std::string>(json, "template", where);
    run.render.cutoff_len = get<int64_t>(json, "cutoff_len", where);
    run.render.target_cutoff_len = get<int64_t>(json, "target_cutoff_len", where);
    run.render.train_on_prompt = get<bool>(json, "train_on_prompt", where);
    run.render.sentence_column = get_or<std::string>(json, "sentence_column", "", where);
    if (!get<bool>(json, "packing", where)) {
      spdlog::info("{}: packing: batches are ragged, without padding, either way", where);
    }

    auto& train = run.train;
    train.per_device_train_batch_size = get<int64_t>(json, "per_device_train_batch_size", where);
    train.max_batch_tokens = get<int64_t>(json, "max_batch_tokens", where);
    train.gradient_accumulation_steps = get<int64_t>(json, "gradient_accumulation_steps", where);
    train.loss_normalization = get<std::string>(json, "loss_normalization", where);
    train.learning_rate = get<double>(json, "learning_rate", where);
    train.router_learning_rate = get<double>(json, "router_learning_rate", where);
    train.optim = get<std::string>(json, "optim", where);
    if (train.optim == "adamw_torch") train.optim = "adamw";
    train.weight_decay = get<double>(json, "weight_decay", where);
    train.adam_beta1 = get<double>(json, "adam_beta1", where);
    train.adam_beta2 = get<double>(json, "adam_beta2", where);
    train.adam_epsilon = get<double>(json, "adam_epsilon", where);
    train.adafactor_initial_step = get<int64_t>(json, "adafactor_initial_step", where);
    train.lr_scheduler_type = get<std::string>(json, "lr_scheduler_type", where);
    if (train.lr_scheduler_type == "constant_with_warmup") train.lr_scheduler_type = "constant";
    train.warmup_ratio = get<double>(json, "warmup_ratio", where);
    train.warmup_steps = get<int64_t>(json, "warmup_steps", where);
    train.max_grad_norm = get<double>(json, "max_grad_norm", where);
    train.max_steps = get<int64_t>(json, "max_steps", where);
    train.num_train_epochs = get<double>(json, "num_train_epochs", where);
    train.gradient_checkpointing = get<bool>(json, "gradient_checkpointing", where);
    train.moe_aux_loss_coef = get<double>(json, "moe_aux_loss_coef", where);
    train.router_z_loss_coef = get<double>(json, "router_z_loss_coef", where);
    train.seed = get<uint64_t>(json, "seed", where);
    train.overwrite_output_dir = get<bool>(json, "overwrite_output_dir", where);
    train.resume_from_checkpoint = get<std::string>(json, "resume_from_checkpoint", where);
    train.logging_steps = get<int64_t>(json, "logging_steps", where);
    train.save_steps = get<int64_t>(json, "save_steps", where);
    train.save_total_limit = get<int64_t>(json, "save_total_limit", where);
    train.eval_steps = get<int64_t>(json, "eval_steps", where);
    train.early_stopping_patience = get<int64_t>(json, "early_stopping_patience", where);
    train.report_to = parse_report_to(json, where);

    MOESAIC_CHECK(!get<bool>(json, "fp16", where), UsageError,
                  "{}: fp16: got true, expected false: float16 overflows in training\nhint: bf16=true", where);
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
