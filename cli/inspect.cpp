// moesaic inspect: what is in a file or folder; and, from a config alone, what a method would train.

#include "cli/command.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/base/count_numbers.h"
#include "moesaic/base/device.h"
#include "moesaic/base/text.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/models/registry.h"
#include "moesaic/run/open.h"

namespace moesaic::cli {
namespace fs = std::filesystem;
namespace {

struct Options {
  std::string path, model, method, targets;
  adapters::AdapterConfig adapter;
  bool tensors = false, json = false;
};

int64_t count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

std::string stored_type(const formats::Checkpoint& checkpoint, const std::string& name) {
  return checkpoint.stored_type(name);
}
template <class Source>
std::string stored_type(const Source& source, const std::string& name) {
  return dtype_name(source.dtype(name));
}

/// Parameter counts per stored type and the tensor list (its names only on request).
template <class Source>
void describe_tensors(const Source& source, const std::vector<std::string>& names, bool list, OrderedJson& report) {
  std::map<std::string, int64_t> by_dtype;
  int64_t total = 0;
  OrderedJson tensors = OrderedJson::array();
  for (const std::string& name : names) {
    const std::vector<int64_t> shape = source.shape(name);
    const std::string dtype = stored_type(source, name);
    by_dtype[dtype] += count(shape);
    total += count(shape);
    if (list) tensors.push_back({{"name", name}, {"dtype", dtype}, {"shape", shape}});
  }
  report["tensors"] = names.size();
  report["parameters"] = total;
  report["parameters_by_dtype"] = by_dtype;
  if (list) report["tensor_list"] = tensors;
}

/// A TensorMap seen as describe_tensors wants it.
struct MapSource {
  const formats::TensorMap& map;
  std::vector<int64_t> shape(const std::string& name) const { return map.at(name).sizes().vec(); }
  at::ScalarType dtype(const std::string& name) const { return map.at(name).scalar_type(); }
};

OrderedJson inspect_safetensors(const fs::path& path, bool list) {
  const formats::SafetensorsFile file(path);
  OrderedJson report = {{"kind", "safetensors"}, {"path", path.string()}};
  describe_tensors(file, file.names(), list, report);
  if (!file.metadata().empty()) report["metadata"] = file.metadata();
  return report;
}

OrderedJson inspect_adapter(const fs::path& path, bool list) {
  const formats::AdapterFolder folder = formats::read_adapter_folder(path);
  const adapters::AdapterConfig config =
      adapters::parse_adapter_config(folder, (path / "adapter_config.json").string());
  OrderedJson report = {{"kind", "adapter"},
                        {"path", path.string()},
                        {"method", config.method},
                        {"num_experts", adapters::experts_json(config)}};
  if (adapters::method_of(config.method).low_rank) {
    report["lora_rank"] = config.lora_rank;
    report["lora_alpha"] = config.lora_alpha;
  }
  if (config.num_experts > 1) report["router"] = adapters::router_config_json(config.router);
  std::visit([&](const auto& targets) { report["targets"] = targets; }, config.targets);
  std::visit(
      [&](const auto& names) {
        if (!names.empty()) report["feedforward"] = names;
      },
      config.feedforward);
  report["base_model"] = config.base_model_name_or_path;
  try {
    report["base_model_found"] = run::base_of(path).string();
  } catch (const UsageError& error) {
    report["base_model_found"] = nullptr;
    spdlog::warn("{}", error.what());
  }
  report["base_fingerprint"] = config.base_fingerprint;
  std::vector<std::string> names;
  for (const auto& [name, tensor] : folder.tensors) names.push_back(name);
  describe_tensors(MapSource{folder.tensors}, names, list, report);
  return report;
}

const char* name_of(nn::ScaleKind kind) {
  switch (kind) {  // without a default: the compiler names a kind that is missing
    case nn::ScaleKind::kInput: return "input";
    case nn::ScaleKind::kOutput: return "output";
    case nn::ScaleKind::kPostHeadNorm: return "post_qk_norm";
    case nn::ScaleKind::kFfn: return "ffn_branch";
  }
  return "";
}

/// Names of the points where experts may act, with how many layers have each. Those of a sparse model's experts, the
/// same in all of a layer, are "experts.*.<name>".
OrderedJson site_table(const nn::Sites& sites) {
  std::set<std::string> others;  // of experts but the first
  std::set<std::string> routed;
  for (const nn::LinearSite& site : sites.linears) {
    if (!site.routed) continue;
    routed.insert(site.name);
    if (site.name.find(".experts.0.") == std::string::npos) others.insert(site.name);
  }
  auto last = [&](const std::string& name) {
    return (routed.contains(name) ? "experts.*." : "") + name.substr(name.rfind('.') + 1);
  };
  OrderedJson linears = OrderedJson::object(), scales = OrderedJson::object();
  for (const nn::LinearSite& site : sites.linears) {
    if (others.contains(site.name)) continue;
    OrderedJson& entry = linears[last(site.name)];
    if (entry.is_null()) entry = {{"layers", 0}, {"in", site.in}, {"out", site.out}};
    entry["layers"] = entry["layers"].get<int64_t>() + 1;
  }
  for (const nn::ScaleSite& site : sites.scales) {
    if (others.contains(site.name)) continue;
    OrderedJson& entry = scales[last(site.name) + " " + name_of(site.kind)];
    if (entry.is_null()) entry = {{"layers", 0}, {"heads", site.heads}, {"width", site.width}};
    entry["layers"] = entry["layers"].get<int64_t>() + 1;
  }
  return {{"linears", linears}, {"scales", scales}};
}

/// The model of a config on the meta device: names and shapes, no memory.
std::shared_ptr<models::SingleModel> meta_model(const formats::Checkpoint& checkpoint) {
  return models::make_model(checkpoint.config(), checkpoint.path().string(),
                            torch::dtype(torch::kFloat32).device(torch::kMeta));
}

OrderedJson model_header(const formats::Checkpoint& checkpoint, const models::SingleModel& model) {
  OrderedJson header = {{"path", checkpoint.path().string()}, {"model_type", model.facts().model_type}};
  header.update(model.sizes());
  return header;
}

bool has_weights(const fs::path& path) {
  if (!fs::is_directory(path)) return true;
  return std::any_of(fs::directory_iterator(path), fs::directory_iterator(), [](const fs::directory_entry& entry) {
    return entry.path().extension() == ".safetensors" || entry.path().filename().string().starts_with("pytorch_model");
  });
}

OrderedJson inspect_model(const fs::path& path, bool list) {
  const bool weights = has_weights(path);
  const auto checkpoint = models::open_checkpoint(path, weights);
  const auto model = meta_model(*checkpoint);
  OrderedJson report = {{"kind", path.extension() == ".gguf" ? "gguf" : "model"}};
  report.update(model_header(*checkpoint, *model));
  report["total_parameters"] = count_numbers(model->parameters());
  if (weights) {
    describe_tensors(*checkpoint, checkpoint->names(), list, report);
    report["fingerprint"] = checkpoint->fingerprint();
    report["tokenizer"] = checkpoint->tokenizer_json().has_value();
    report["chat_template"] = !checkpoint->chat_templates().empty();
  }
  report["sites"] = site_table(model->sites());
  return report;
}

/// What training `method` inside the model of a config would train.
OrderedJson inspect_method(const Options& options) {
  const auto checkpoint = models::open_checkpoint(options.model, /*weights=*/false);
  const auto model = meta_model(*checkpoint);
  const int64_t total = count_numbers(model->parameters());
  OrderedJson report = model_header(*checkpoint, *model);
  report["method"] = options.method;
  if (options.method == "full") {
    report.update(OrderedJson{{"total_parameters", total}, {"trainable_parameters", total}, {"percent", 100.0}});
    return report;
  }
  adapters::AdapterConfig config = options.adapter;
  config.method = options.method;
  if (options.targets.empty() || options.targets == "reference" || options.targets == "all-linear") {
    config = adapters::resolve_targets(config, options.targets, model->sites());
  } else {
    const std::vector<std::string> names = CLI::detail::split(options.targets, ',');
    config.targets = names;
    std::vector<std::string> feedforward;
    for (const std::string& name : names) {
      const bool is_down =
          std::any_of(model->sites().linears.begin(), model->sites().linears.end(), [&](const auto& site) {
            return site.role == nn::Role::kDown && adapters::matches_target(std::vector<std::string>{name}, site.name);
          });
      if (is_down) feedforward.push_back(name);
    }
    if (!adapters::method_of(config.method).low_rank) config.feedforward = feedforward;
  }
  const auto adapter = adapters::Adapter::create(config, model->sites(), torch::kMeta, 0);
  const int64_t trainable = count_numbers(adapter->parameters());
  int64_t router = 0;
  for (const nn::Parameter& parameter : adapter->parameters()) {
    if (parameter.kind == nn::Parameter::Kind::kRouter) router += parameter.tensor.numel();
  }
  OrderedJson patterns = OrderedJson::array();
  int64_t sites = 0;
  for (const auto& [pattern, hits] : adapter->matches()) {
    int64_t parameters = 0;
    for (const nn::Parameter& parameter : adapter->parameters()) {
      if (("." + parameter.name + ".").find("." + pattern + ".") != std::string::npos)
        parameters += parameter.tensor.numel();
    }
    patterns.push_back({{"pattern", pattern}, {"sites", hits}, {"trainable_parameters", parameters}});
    sites += hits;
  }
  report["num_experts"] = config.num_experts;
  if (adapters::method_of(config.method).low_rank) {
    report["lora_rank"] = config.lora_rank;
    report["lora_alpha"] = config.lora_alpha;
  }
  report["total_parameters"] = total;
  report["trainable_parameters"] = trainable;
  report["router_parameters"] = router;
  report["percent"] = 100.0 * static_cast<double>(trainable) / static_cast<double>(total);
  report["sites"] = sites;
  report["patterns"] = patterns;
  return report;
}

OrderedJson inspect_composition(const fs::path& path, bool list) {
  const Json config = read_json(path / "calm_config.json");
  const formats::SafetensorsFile file(path / "calm_model.safetensors");
  OrderedJson report = {{"kind", "composition"}, {"path", path.string()}};
  describe_tensors(file, file.names(), list, report);
  report.update(OrderedJson(config));
  return report;
}

OrderedJson inspect_path(const fs::path& path, bool list) {
  MOESAIC_CHECK(fs::exists(path), UsageError, "inspect {}: no such file or folder", path.string());
  if (path.extension() == ".safetensors") return inspect_safetensors(path, list);
  if (formats::is_adapter(path)) return inspect_adapter(path, list);
  if (compose::is_composition(path)) return inspect_composition(path, list);
  return inspect_model(path, list);
}

/// Scalars as "key  value" lines; lists and objects one entry a line.
void show(const OrderedJson& report) {
  auto text = [](const OrderedJson& value) {
    return value.is_string()         ? visible_in_line(value.get<std::string>())
           : value.is_number_float() ? fmt::format("{:.4f}", value.get<double>())
                                     : value.dump();
  };
  for (const auto& [key, value] : report.items()) {
    if (key == "tensor_list") {
      for (const OrderedJson& tensor : value) {
        say("  {:<70} {:<9} {}\n", visible_in_line(tensor["name"].get<std::string>()),
            tensor["dtype"].get<std::string>(), shape_text(tensor["shape"].get<std::vector<int64_t>>()));
      }
    } else if (key == "patterns") {
      say("\n  {:<30} {:>7} {:>14}\n", "target", "sites", "trainable");
      for (const OrderedJson& row : value) {
        say("  {:<30} {:>7} {:>14}\n", visible_in_line(row["pattern"].get<std::string>()), row["sites"].get<int64_t>(),
            row["trainable_parameters"].get<int64_t>());
      }
    } else if (value.is_array() && !value.empty() && value[0].is_object()) {
      for (size_t i = 0; i < value.size(); ++i) {
        say("{}[{}]\n", key, i);
        for (const auto& [name, entry] : value[i].items()) say("  {:<20} {}\n", visible_in_line(name), text(entry));
      }
    } else if (value.is_object() && !value.empty()) {
      say("{}\n", visible_in_line(key));
      for (const auto& [name, entry] : value.items()) {
        if (!entry.is_object()) {
          say("  {:<20} {}\n", visible_in_line(name), text(entry));
          continue;
        }
        say("  {}\n", visible_in_line(name));
        for (const auto& [site, facts] : entry.items()) say("    {:<24} {}\n", visible_in_line(site), facts.dump());
      }
    } else {
      say("{:<22} {}\n", key, text(value));
    }
  }
}

int run(const Options& options) {
  MOESAIC_CHECK(options.path.empty() != options.model.empty(), UsageError,
                "inspect: give a file or folder to look into, or --model CONFIG_DIR --method METHOD");
  MOESAIC_CHECK(options.model.empty() || !options.method.empty(), UsageError,
                "inspect --model: --method is missing. Expected lora, ia3, mov, molora or full.");
  const OrderedJson report =
      options.model.empty() ? inspect_path(options.path, options.tensors) : inspect_method(options);
  if (options.json) {
    say("{}\n", report.dump(2, ' ', false, OrderedJson::error_handler_t::replace));
  } else {
    show(report);
  }
  return 0;
}

}  // namespace

Runner add_inspect(CLI::App& app, CommonOptions&) {
  auto options = std::make_shared<Options>();
  app.add_option("path", options->path, "Model, composition or adapter folder, .gguf or .safetensors file");
  app.add_flag("--tensors", options->tensors, "List every tensor");
  app.add_flag("--json", options->json, "Print as JSON");
  const char* group = "What a method would train (a config.json is enough)";
  app.add_option("--model", options->model, "Folder with config.json, or a .gguf file")->group(group);
  std::vector<std::string> methods = adapters::method_names();
  methods.emplace_back("full");
  app.add_option("--method", options->method, fmt::format("{}", fmt::join(methods, ", ")))
      ->check(CLI::IsMember(methods))
      ->group(group);
  app.add_option("--num_experts", options->adapter.num_experts, "Experts per site")
      ->capture_default_str()
      ->group(group);
  app.add_option("--lora_rank", options->adapter.lora_rank, "Rank of an expert")->capture_default_str()->group(group);
  app.add_option("--lora_alpha", options->adapter.lora_alpha, "Scale is alpha / rank")
      ->capture_default_str()
      ->group(group);
  app.add_option("--lora_target", options->targets, "reference, all-linear, or names separated by commas")
      ->group(group);
  app.add_option("--router_input", options->adapter.router.input, "token, sentence, layer_input or ffn_product")
      ->capture_default_str()
      ->group(group);
  return [options] { return run(*options); };
}

}  // namespace moesaic::cli
