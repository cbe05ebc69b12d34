#include "cli/options.h"

namespace moesaic::cli {
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
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
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

std::string Loaded::computes_in() const {
  return fmt::format("{} on {} ({})", dtype_name(format.dtype), model->facts().device.str(), format.reason);
}

Loaded load(const ModelOptions& options, const CommonOptions& common, bool needs_tokenizer) {
  std::vector<run::AdapterReference> adapters;
  for (const std::string& flag : options.adapters) adapters.push_back(run::parse_adapter_reference(flag));
  const c10::Device device = parse_device(common.device);
  const NumberFormat format = number_format(common.dtype, device);
  return {run::open(options.model, adapters,
                    {.device = device,
                     .dtype = format.dtype,
                     .quantize_int8 = options.quantize == "int8",
                     .needs_tokenizer = needs_tokenizer}),
          format};
}

}  // namespace moesaic::cli
