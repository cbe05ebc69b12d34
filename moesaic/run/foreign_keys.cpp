#include "moesaic/run/foreign_keys.h"

#include <algorithm>

namespace moesaic::run {
namespace {

bool any_value(const OrderedJson&) { return true; }

bool is_unset(const OrderedJson& value) {
  return value.is_null() || value == false || value == 0 || value == "" || value == "none" ||
         (value.is_structured() && value.empty());
}

bool is_set(const OrderedJson& value) { return !is_unset(value); }

bool is_steps(const OrderedJson& value) { return value.is_null() || value == "steps"; }

struct ForeignKey {
  const char* key;
  bool (*harmless)(const OrderedJson& value);  // nothing of what is learnt hangs on this value
  const char* reason;                          // what to do instead of any other
};

constexpr const char* kNotHere = "is not done here";

constexpr ForeignKey kForeignKeys[] = {
    // How work is spread over processes and machines, and how memory is saved.
    {"deepspeed", any_value, ""},
    {"fsdp", any_value, ""},
    {"fsdp_config", any_value, ""},
    {"ddp_find_unused_parameters", any_value, ""},
    {"preprocessing_num_workers", any_value, ""},
    {"preprocessing_batch_size", any_value, ""},
    {"dataloader_num_workers", any_value, ""},
    {"dataloader_pin_memory", any_value, ""},
    {"dataloader_persistent_workers", any_value, ""},
    {"dataloader_prefetch_factor", any_value, ""},
    {"group_by_length", any_value, ""},
    {"low_cpu_mem_usage", any_value, ""},
    {"flash_attn", any_value, ""},
    {"enable_liger_kernel", any_value, ""},
    {"use_unsloth", any_value, ""},
    {"use_unsloth_gc", any_value, ""},
    {"use_cache", any_value, ""},
    {"tf32", any_value, ""},
    {"per_device_eval_batch_size", any_value, ""},
    // Where files come from and lie.
    {"trust_remote_code", any_value, ""},
    {"use_fast_tokenizer", any_value, ""},
    {"cache_dir", any_value, ""},
    {"overwrite_cache", any_value, ""},
    {"save_safetensors", any_value, ""},
    {"save_only_model", any_value, ""},
    {"logging_dir", any_value, ""},
    {"streaming", any_value, ""},
    {"buffer_size", any_value, ""},
    {"remove_unused_columns", any_value, ""},
    {"image_max_pixels", any_value, ""},
    {"image_min_pixels", any_value, ""},
    {"video_max_pixels", any_value, ""},
    {"video_min_pixels", any_value, ""},
    // What is told of a run.
    {"plot_loss", any_value, ""},
    {"include_num_input_tokens_seen", any_value, ""},
    {"include_tokens_per_second", any_value, ""},
    {"logging_first_step", any_value, ""},
    {"disable_tqdm", any_value, ""},
    {"log_level", any_value, ""},
    {"run_name", any_value, ""},
    {"do_eval", any_value, ""},
    // What would learn something else.
    {"do_train", is_set, "`moesaic train` trains; `moesaic eval` scores"},
    {"do_predict", is_unset, "`moesaic eval` and `moesaic generate` answer"},
    {"predict_with_generate", is_unset, "give eval.tasks, or ask with `moesaic eval`"},
    {"push_to_hub", is_unset, "nothing is uploaded"},
    {"greater_is_better", is_unset, "losses fall and scores rise: leave it out"},
    {"logging_strategy", is_steps, "give logging_steps"},
    {"mask_history", is_unset, "give earlier turns `weight: 0` in the data"},
    {"default_system", is_unset, "write the system turn into the data, or a template of your own"},
    {"tokenized_path", is_unset, "rows are tokenised as they are read"},
    {"additional_target", is_unset, kNotHere},
    {"create_new_adapter", is_unset, "`moesaic merge` the adapter into its base and begin there"},
    {"use_dora", is_unset, "DoRA adapters are used and merged, not trained"},
    {"pissa_init", is_unset, kNotHere},
    {"loraplus_lr_ratio", is_unset, kNotHere},
    {"neftune_noise_alpha", is_unset, kNotHere},
    {"use_galore", is_unset, kNotHere},
    {"use_apollo", is_unset, kNotHere},
    {"use_badam", is_unset, kNotHere},
    {"use_llama_pro", is_unset, kNotHere},
    {"pure_bf16", is_unset, "adapters are float32 here; bf16 is the frozen model's"},
    {"resize_vocab", is_unset, "the vocabulary stays the model's"},
    {"rope_scaling", is_unset, "set it in the model's config.json"},
    {"shift_attn", is_unset, kNotHere},
    {"mixture_of_depths", is_unset, kNotHere},
    {"lr_scheduler_kwargs", is_unset, kNotHere},
    {"dataset_shards", is_unset, kNotHere},
};

}  // namespace

std::vector<std::string> take_foreign_keys(OrderedJson& run, std::vector<std::string>& refused) {
  std::vector<std::string> passed_over;
  for (const ForeignKey& foreign : kForeignKeys) {
    const auto found = run.find(foreign.key);
    if (found == run.end()) continue;
    if (foreign.harmless(*found)) {
      passed_over.emplace_back(foreign.key);
    } else {
      refused.push_back(fmt::format("{}: got {}: {}", foreign.key, found->dump(), foreign.reason));
    }
    run.erase(foreign.key);
  }
  return passed_over;
}

std::string foreign_keys_markdown() {
  std::vector<std::string> always, unset;
  for (const ForeignKey& foreign : kForeignKeys) {
    (foreign.harmless == any_value ? always : unset).push_back(fmt::format("`{}`", foreign.key));
  }
  return fmt::format(
      "## LLaMA-Factory's other keys\n\nPassed over with one note, for nothing of what is learnt hangs on them: {}.\n\n"
      "Passed over where they ask for nothing, else refused with the reason: {}.\n",
      fmt::join(always, ", "), fmt::join(unset, ", "));
}

}  // namespace moesaic::run
