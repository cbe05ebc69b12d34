// moesaic compose: an anchor and augmenting models become a composition folder, ready to be trained.
#include "moesaic/run/compose.h"

#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/base/yaml.h"

namespace moesaic::cli {
namespace {

struct ComposeOptions {
  std::string file;                    // config.yaml
  std::vector<std::string> overrides;  // key=value
};

int run_compose(const ComposeOptions& options, const CommonOptions& common) {
  OrderedJson keys = read_yaml(options.file);
  apply_overrides(keys, options.overrides);
  const c10::Device device = parse_device(common.device);
  const models::LoadOptions load{number_format(common.dtype, device).dtype, device, false};
  say(run::compose_models(Json(keys), options.file, common.seed, load).text());
  return 0;
}

}  // namespace

Runner add_compose(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<ComposeOptions>();
  app.add_option("config", options->file, "What to compose (YAML)")->required();
  app.add_option("overrides", options->overrides, "key=value: sets a key of the file");
  return [options, &common] { return run_compose(*options, common); };
}

}  // namespace moesaic::cli
