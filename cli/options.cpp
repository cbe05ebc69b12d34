#include "cli/options.h"

#include "cli/threads.h"
#include "moesaic/base/progress.h"

namespace moesaic::cli {

CLI::Option* repeated(CLI::Option* option) {
  return option->expected(1)->allow_extra_args(false)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void add_model_options(CLI::App& app, ModelOptions& options) {
  app.add_option("model_or_adapter", options.named,
                 "Adapter folder, which knows its base; or a model or composition, as --model takes it");
  app.add_option("--model", options.model,
                 "Model: a folder with config.json, a .gguf file, or a composition's folder; an adapter's own base if "
                 "it is left out");
  repeated(app.add_option("--adapter", options.adapters, "Adapter folder, [NAME=]DIR[:scale]; may be repeated"));
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
  repeated(app.add_option("--stop", options.stop, "Text that ends an answer and is cut from it; may be repeated"))
      ->group(group);
}

void add_task_options(CLI::App& app, std::vector<std::string>& tasks, eval::TaskOptions& task, run::AskOptions& ask) {
  repeated(app.add_option("--tasks", tasks,
                          "Built-in tasks, task files (.yaml), data files or folders of them; comma-separated or "
                          "repeated"))
      ->required()
      ->delimiter(',');
  app.add_option("--data_dir", task.data_dir, "Folder in which the data files of built-in tasks and task files lie")
      ->capture_default_str();
  app.add_option("--limit", task.limit, "Questions per task at most; 0 = all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_flag_function(
      "--apply_chat_template,!--no-apply_chat_template", [&ask](int64_t times) { ask.apply_chat_template = times > 0; },
      "Ask through the model's chat template, or not; default: as the adapter was trained, without one not");
  app.add_option("--target_delimiter", ask.target_delimiter,
                 "Between prompt and answer, without chat template; default: none for an adapter trained without one, "
                 "else a blank");
}

run::TaskProgress task_bars() {
  return [bar = std::shared_ptr<Progress>(), of = std::string()](const eval::Task& task, int64_t done) mutable {
    if (!bar || of != task.name) {
      bar.reset();  // ends the line of the one before
      bar = std::make_shared<Progress>(task.name, std::ssize(task.items));
      of = task.name;
    }
    bar->update(done);
  };
}

std::string Loaded::computes_in() const {
  return fmt::format("{} on {} ({})", dtype_name(format.dtype), model->facts().device.str(), format.reason);
}

std::pair<std::string, std::string> single_adapter(const run::ModelReference& reference) {
  MOESAIC_CHECK(reference.adapters.size() <= 1, UsageError, "got {} adapters, expected one", reference.adapters.size());
  if (reference.adapters.empty()) return {reference.model, ""};
  const run::AdapterReference& adapter = reference.adapters[0];
  MOESAIC_CHECK(adapter.scale == 1.0, UsageError, "{}: got the scale {}, expected none: an adapter is folded as it is",
                adapter.dir.string(), adapter.scale);
  return {reference.model, adapter.dir.string()};
}

Loaded load(const ModelOptions& options, const CommonOptions& common, bool needs_tokenizer) {
  ask_for_huge_pages();
  run::ModelReference from = run::resolve_model(options.named, options.model, options.adapters);
  const c10::Device device = parse_device(common.device);
  const NumberFormat format = number_format(common.dtype, device);
  run::Opened opened = run::open(from.model, from.adapters,
                                 {.device = device,
                                  .dtype = format.dtype,
                                  .quantize_int8 = options.quantize == "int8",
                                  .needs_tokenizer = needs_tokenizer});
  return {std::move(opened), std::move(from), format};
}

}  // namespace moesaic::cli
