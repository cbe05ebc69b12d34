// moesaic mix: LoRAs that one already has become the experts of one MoLoRA.
#include "moesaic/adapters/mix.h"
#include "cli/command.h"
#include "moesaic/run/open.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct MixOptions {
  std::vector<std::string> adapters;
  std::string out, router = "uniform";
  int64_t top_k = 0;
  double temperature = 1.0;
};

adapters::RouterConfig router_of(const MixOptions& options) {
  adapters::RouterConfig router;
  const bool plain = options.top_k == 0 && options.temperature == 1.0;
  MOESAIC_CHECK(options.router == "arrow" || plain, UsageError,
                "--top_k, --temperature: got them with --router uniform, which weighs all experts alike, expected "
                "--router arrow");
  MOESAIC_CHECK(options.top_k <= std::ssize(options.adapters), UsageError,
                "--top_k: got {}, expected 1 to {}, the number of adapters, or 0 for all", options.top_k,
                options.adapters.size());
  if (options.router == "arrow") router.logits = "absolute";
  if (options.top_k > 0) {
    router.type = "top_k";
    router.top_k = options.top_k;
    router.topk_mode = "renorm";
  }
  router.temperature = options.temperature;
  return router;
}

/// The model that the adapters name, as this folder finds it: what is written here is used from here.
std::string base_from_here(const fs::path& adapter, const std::string& named) {
  try {
    return run::base_of(adapter).string();
  } catch (const UsageError&) {  // it stands elsewhere; --model names it, as for the adapters themselves
    return named;
  }
}

/// Chat templates and special tokens that an adapter brings of its own.
formats::TokenizerFiles words_of(const std::string& adapter) {
  const formats::ChatTemplates its_bases{{"default", "as the base"}};
  formats::TokenizerFiles files{std::nullopt, Json::object(), its_bases};
  formats::adapt(files, adapter);
  if (files.chat_templates.empty()) {
    files.chat_templates = formats::kNoTemplate;
  } else if (files.chat_templates == its_bases) {
    files.chat_templates.clear();
  }
  return files;
}

/// The mix is asked in the first adapter's words. Warns of others that were trained in other ones.
void copy_words(const std::vector<std::string>& adapters, const fs::path& out) {
  std::vector<formats::TokenizerFiles> all;
  for (const std::string& dir : adapters) all.push_back(words_of(dir));
  for (size_t e = 1; e < all.size(); ++e) {
    if (all[e].chat_templates == all[0].chat_templates) continue;
    spdlog::warn("{} was trained with another chat template than {}, whose the mix takes", adapters[e], adapters[0]);
  }
  formats::write_tokenizer_files(out, all[0]);
}

int run_mix(const MixOptions& options) {
  std::vector<adapters::MixPart> parts;
  for (const std::string& dir : options.adapters) parts.push_back(adapters::read_mix_part(dir));
  formats::AdapterFolder mix = adapters::mix(parts, router_of(options));
  mix.config["base_model_name_or_path"] =
      base_from_here(options.adapters[0], mix.config["base_model_name_or_path"].get<std::string>());
  check_new_folder(options.out, std::vector<fs::path>(options.adapters.begin(), options.adapters.end()));
  const formats::TensorMap routers =
      options.router == "arrow" ? adapters::arrow_routers(mix) : adapters::even_routers(mix);
  mix.tensors.insert(routers.begin(), routers.end());
  formats::write_adapter_folder(options.out, mix);
  copy_words(options.adapters, options.out);
  say("{}: a MoLoRA of {} experts, {} router{}, base {}\n", options.out, parts.size(), options.router,
      options.top_k > 0 ? fmt::format(" (the {} nearest)", options.top_k) : "",
      mix.config["base_model_name_or_path"].get<std::string>());
  for (size_t e = 0; e < parts.size(); ++e) say("  expert {}  {}\n", e, adapters::describe(parts[e], mix));
  return 0;
}

}  // namespace

Runner add_mix(CLI::App& app, CommonOptions&) {
  auto options = std::make_shared<MixOptions>();
  app.add_option("adapters", options->adapters, "LoRA folders, PEFT's or ours, of one base model: the experts")
      ->required();
  app.add_option("-o,--output", options->out, "The MoLoRA's folder: new or empty")->required();
  app.add_option("--router", options->router,
                 "uniform: every expert with the weight 1/N; arrow: by how near an input is to the direction that each "
                 "expert stretches most")
      ->capture_default_str()
      ->check(CLI::IsMember({"uniform", "arrow"}));
  app.add_option("--top_k", options->top_k, "arrow: the experts mixed for a token; 0 = all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--temperature", options->temperature, "arrow: divides the router's logits")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  return [options] { return run_mix(*options); };
}

}  // namespace moesaic::cli
