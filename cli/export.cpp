// moesaic export: models and adapters in the forms other tools load.
#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/export/merge.h"
#include "moesaic/export/peft.h"
#include "moesaic/models/registry.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct ExportOptions {
  std::string model, adapter, out;
  std::string format = "hf";
};

int run_export(const ExportOptions& options, const CommonOptions& common) {
  check_new_folder(options.out, {options.model, options.adapter});
  if (options.format == "peft") {
    MOESAIC_CHECK(!options.adapter.empty(), UsageError, "--format peft: got no --adapter, expected the one to write");
    for (const auto& dir : exporting::export_peft(options.adapter, options.out)) say("{}\n", dir.string());
    return 0;
  }
  MOESAIC_CHECK(!options.model.empty(), UsageError, "--format hf: got no --model, expected the one to write");
  const auto checkpoint = models::open_checkpoint(options.model);
  auto folder =
      exporting::model_folder(*checkpoint, common.dtype == "auto" ? exporting::stored_dtype(*checkpoint)
                                                                  : number_format(common.dtype, torch::kCPU).dtype);
  if (!options.adapter.empty()) exporting::merge_adapter(folder, options.adapter);
  formats::write_model_folder(options.out, folder);
  say("{}: {} tensors, {}{}\n", options.out, folder.tensors.size(), dtype_name(folder.dtype),
      fs::path(options.model).extension() == ".gguf" ? " (dequantised)" : "");
  return 0;
}

}  // namespace

Runner add_export(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<ExportOptions>();
  app.add_option("--model", options->model, "Model to write: a folder with config.json, or a .gguf file");
  app.add_option("--adapter", options->adapter, "Adapter: merged into the model (hf), or written itself (peft)");
  app.add_option("--format", options->format, "hf: a Hugging Face folder; peft: PEFT adapter folders, one per expert")
      ->capture_default_str()
      ->check(CLI::IsMember({"hf", "peft"}));
  app.add_option("out", options->out, "Folder to write")->required();
  return [options, &common] { return run_export(*options, common); };
}

}  // namespace moesaic::cli
