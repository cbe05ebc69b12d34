// moesaic export: models and adapters in the forms other tools load.
#include "cli/options.h"
#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/export/gguf.h"
#include "moesaic/export/merge.h"
#include "moesaic/export/peft.h"
#include "moesaic/models/registry.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct ExportOptions {
  std::string model;
  std::vector<std::string> adapters, paths;  // paths: [MODEL_OR_ADAPTER] OUT
  std::string format = "hf";
};

int run_export(const ExportOptions& options, const CommonOptions& common) {
  const std::string& out = options.paths.back();
  const std::string named = options.paths.size() > 1 ? options.paths[0] : "";
  if (options.format == "peft") {
    std::vector<std::string> adapters = options.adapters;
    if (!named.empty()) adapters.insert(adapters.begin(), named);
    MOESAIC_CHECK(adapters.size() == 1, UsageError, "--format peft: got {} adapters, expected the one to write",
                  adapters.size());
    check_new_folder(out, {options.model, adapters[0]});
    for (const auto& dir : exporting::export_peft(adapters[0], out)) say("{}\n", dir.string());
    return 0;
  }
  const auto [model, adapter] = single_adapter(run::resolve_model(named, options.model, options.adapters));
  if (options.format == "gguf") {
    MOESAIC_CHECK(!adapter.empty(), UsageError,
                  "--format gguf: got the model {} alone, expected an adapter: models are not written as GGUF yet",
                  model);
    const auto base = models::open_checkpoint(model, /*weights=*/false);
    const std::string bytes = exporting::gguf_adapter(adapter, base->config(), model);
    write_new_file(out, bytes);
    say("{}: {} bytes, for `llama-server --lora {}` over this base\n", out, bytes.size(), out);
    return 0;
  }
  check_new_folder(out, {model, adapter});
  const auto checkpoint = models::open_checkpoint(model);
  auto folder =
      exporting::model_folder(*checkpoint, common.dtype == "auto" ? exporting::stored_dtype(*checkpoint)
                                                                  : number_format(common.dtype, torch::kCPU).dtype);
  if (!adapter.empty()) exporting::merge_adapter(folder, adapter);
  formats::write_model_folder(out, folder);
  say("{}: {} tensors, {}{}\n", out, folder.tensors.size(), dtype_name(folder.dtype),
      fs::path(model).extension() == ".gguf" ? " (dequantised)" : "");
  return 0;
}

}  // namespace

Runner add_export(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<ExportOptions>();
  app.add_option("--model", options->model,
                 "Model to write: a folder with config.json, or a .gguf file; the adapter's base if it is left out");
  repeated(
      app.add_option("--adapter", options->adapters, "Adapter: merged into the model (hf), or written itself (peft)"));
  app.add_option("--format", options->format,
                 "hf: a Hugging Face folder; peft: PEFT adapter folders, one per expert; gguf: a LoRA as one file for "
                 "llama.cpp")
      ->capture_default_str()
      ->check(CLI::IsMember({"hf", "peft", "gguf"}));
  app.add_option("paths", options->paths,
                 "[MODEL_OR_ADAPTER] OUT: what to write, and the folder (of gguf the file) for it")
      ->required()
      ->expected(1, 2);
  return [options, &common] { return run_export(*options, common); };
}

}  // namespace moesaic::cli
