// moesaic convert: a checkpoint of the paper's released code becomes a composition folder.

#include "cli/command.h"
#include "moesaic/base/count_numbers.h"
#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/compose/folder.h"
#include "moesaic/compose/released.h"

namespace moesaic::cli {
namespace {

struct ConvertOptions {
  std::string in, out, anchor, augmenting;
  std::string mask = "full";
};

int run(const ConvertOptions& options, const CommonOptions& common) {
  check_new_folder(options.out, {options.in, options.anchor, options.augmenting});
  const c10::Device device = parse_device(common.device);
  const compose::ReleasedOptions released{
      options.anchor, options.augmenting, options.mask, {number_format(common.dtype, device).dtype, device, false}};
  const auto composition = compose::import_released(options.in, released);
  compose::save_composition(*composition, options.out);
  const int64_t parameters = count_numbers(composition->parameters());
  say("anchor      {}\naugmenting  {}\n", composition->anchor_member().checkpoint->path().string(),
      composition->augmenting()[0].checkpoint->path().string());
  for (const compose::ConnectionPair& pair : composition->config().augmenting[0].connections) {
    say("            block {} -> anchor block {}\n", pair.aug, pair.anchor);
  }
  say("connections {} parameters, {} heads, mask {}\nwritten     {}\n", parameters,
      composition->config().connection.num_heads, options.mask, options.out);
  return 0;
}

}  // namespace

Runner add_convert(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<ConvertOptions>();
  app.add_option("in", options->in, "Folder with config.json and pytorch_model.bin or model.safetensors")->required();
  app.add_option("out", options->out, "Composition folder to write")->required();
  app.add_option("--anchor", options->anchor, "The anchor's folder; else the one that config.json names");
  app.add_option("--augmenting", options->augmenting, "The augmenting model's folder; else as in config.json");
  app.add_option("--mask", options->mask,
                 "full: the released code's numbers, where positions see the future; causal or prefix: to train on and "
                 "generate with")
      ->capture_default_str()
      ->check(CLI::IsMember({"full", "causal", "prefix"}));
  return [options, &common] { return run(*options, common); };
}

}  // namespace moesaic::cli
