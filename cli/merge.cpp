// moesaic merge: an adapter with one expert becomes part of its base model.
#include "moesaic/export/merge.h"
#include "cli/options.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/models/registry.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct MergeOptions {
  std::string model;
  std::vector<std::string> adapters, paths;  // paths: [ADAPTER] OUT
  std::string onto;                          // original | dequantized; "" = original unless the base is quantised
};

/// Logits of a fixed short sequence, float32.
torch::Tensor probe_logits(models::LanguageModel& model) {
  torch::NoGradGuard no_grad;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 32; ++i) ids.push_back((i * 7919 + 11) % model.facts().vocab_size);
  nn::Pass pass;
  return model.head().logits(model.hidden({nn::RaggedBatch::from_sequences({ids})}, pass));
}

int run_merge(const MergeOptions& options, const CommonOptions& common) {
  const std::string& out = options.paths.back();
  const auto [model, adapter_dir] = single_adapter(
      run::resolve_model(options.paths.size() > 1 ? options.paths[0] : "", options.model, options.adapters));
  MOESAIC_CHECK(!adapter_dir.empty(), UsageError, "merge: got no adapter, expected the one to fold into {}", model);
  const auto checkpoint = models::open_checkpoint(model);
  const bool quantized = fs::path(model).extension() == ".gguf";
  MOESAIC_CHECK(!(quantized && options.onto == "original"), UsageError,
                "--onto: got original for {}, whose weights are quantised: merged weights don't fit back into them\n"
                "hint: --onto dequantized writes them as {}",
                model, common.dtype == "auto" ? "float32" : common.dtype);
  check_new_folder(out, {model, adapter_dir});
  const auto dtype =
      common.dtype != "auto" ? number_format(common.dtype, torch::kCPU).dtype : exporting::stored_dtype(*checkpoint);

  auto folder = exporting::model_folder(*checkpoint, dtype);
  exporting::merge_adapter(folder, adapter_dir);
  formats::write_model_folder(out, folder);

  // The proof: the merged model against the base with the adapter beside it.
  auto base = models::load_model(*checkpoint);
  const auto adapter = adapters::Adapter::open(adapter_dir, base->sites(), torch::kCPU, checkpoint->fingerprint());
  auto merged = models::load_model(*models::open_checkpoint(out));
  const auto expected = probe_logits(*base), got = probe_logits(*merged);
  const double drift = (expected - got).abs().max().item<double>();
  say("{}: {} merged into {} weights, {}\n", out, adapter->config().method, quantized ? "dequantised" : "the original",
      dtype_name(dtype));
  say("largest logit difference from base + adapter: {:.2g} (logits up to {:.3g})\n", drift,
      expected.abs().max().item<double>());
  return 0;
}

}  // namespace

Runner add_merge(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<MergeOptions>();
  app.add_option("--model", options->model,
                 "Base model: a folder with config.json, or a .gguf file; the adapter's own if it is left out");
  repeated(app.add_option("--adapter", options->adapters, "Adapter folder (LoRA or (IA)^3, or one expert)"));
  app.add_option("--onto", options->onto, "original, or dequantized for a quantised base (what is written is not)")
      ->check(CLI::IsMember({"original", "dequantized"}));
  app.add_option("paths", options->paths, "[ADAPTER] OUT: the adapter's folder, and the one to write")
      ->required()
      ->expected(1, 2);
  return [options, &common] { return run_merge(*options, common); };
}

}  // namespace moesaic::cli
