// moesaic upcycle: a sparse mixture-of-experts model made out of dense ones.
#include "moesaic/export/upcycle.h"

#include "cli/command.h"
#include "moesaic/base/yaml.h"

namespace moesaic::cli {
namespace {

/// What float32 leaves between one network and equal ones whose weights sum to 1.
constexpr double kEqual = 1e-5;

struct UpcycleOptions {
  std::string file, out;
  std::vector<std::string> overrides;  // key=value
  bool check_equal = false;
};

void say_receipt(const exporting::Upcycled& made, const std::string& out) {
  const std::string shared =
      made.shared_width > 0 ? fmt::format(" beside a shared one of width {}", made.shared_width) : "";
  say("family      {}, {} layers\n", made.family, made.layers);
  say("experts     {} of width {}, {} for each token{}\n", made.experts, made.expert_width, made.experts_per_token,
      shared);
  say("parameters  {}, of which {} ({:.1f} %) work for each token\n", made.parameters, made.active_parameters,
      100.0 * static_cast<double>(made.active_parameters) / static_cast<double>(made.parameters));
  say("written     {}: {} bytes, {}{}\n", out, made.bytes, made.dtype,
      made.dequantised ? " (the base's blocks dequantised)" : "");
  say("start       {}\n", made.promise);
  if (made.experts_per_token == 1 && !made.routers_learn) {
    say("            with one expert for each token its weight is always 1: only a balance loss trains the router\n");
  }
}

int run_upcycle(const UpcycleOptions& options, const CommonOptions& common) {
  OrderedJson keys = read_yaml(options.file);
  apply_overrides(keys, options.overrides);
  const exporting::Upcycling wanted = exporting::parse_upcycling(Json(keys), options.file, common.seed);
  const exporting::Upcycled made = exporting::upcycle(wanted, options.out);
  say_receipt(made, options.out);
  if (!options.check_equal) return 0;
  const double difference = exporting::logit_difference(wanted.base_model, options.out, wanted.seed);
  say("check       largest logit difference from the dense model, of its largest logit: {:.2g}\n", difference);
  MOESAIC_CHECK(!made.equals_dense || difference <= kEqual, DataError,
                "--check-equal: got a difference of {:.2g}, expected at most {:.0g} of method {}", difference, kEqual,
                wanted.method);
  return 0;
}

}  // namespace

Runner add_upcycle(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<UpcycleOptions>();
  app.add_flag("--check-equal", options->check_equal,
               "Run both models on 64 tokens; an error when the method promises equality and they differ");
  app.add_option("config", options->file, "What to make (YAML of ours or of mergekit-moe)")->required();
  app.add_option("out", options->out, "The folder to write, new or empty")->required();
  app.add_option("overrides", options->overrides, "key=value: sets a key of the file");
  return [options, &common] { return run_upcycle(*options, common); };
}

}  // namespace moesaic::cli
