// moesaic models: the models, adapters and compositions of some folders, and which of them this machine's memory holds.

#include "cli/memory_limit.h"
#include "cli/options.h"
#include "moesaic/base/progress.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/formats/safetensors.h"
#include "moesaic/models/registry.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDemoModel = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
constexpr double kMib = 1 << 20;

struct Options {
  std::vector<std::string> folders;
  bool json = false;
};

bool holds(const fs::path& folder, const std::string& weights) {
  return formats::is_there(folder / weights) || formats::is_there(folder / (weights + ".index.json"));
}

bool is_model(const fs::path& path) {
  if (!fs::is_directory(path)) return path.extension() == ".gguf";
  return formats::is_there(path / "config.json") &&
         (holds(path, "model.safetensors") || holds(path, "pytorch_model.bin"));
}

bool is_listed(const fs::path& path) {
  return is_model(path) || formats::is_adapter(path) || compose::is_composition(path);
}

/// `folder` when it is something itself, else those of its children that are, by name.
std::vector<fs::path> found_in(const fs::path& folder) {
  if (is_listed(folder)) return {folder};
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder, fs::directory_options::skip_permission_denied)) {
    if (is_listed(entry.path())) found.push_back(folder == "." ? entry.path().filename() : entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// Of a folder the files directly in it that hold weights.
uint64_t bytes_on_disk(const fs::path& path) {
  if (!fs::is_directory(path)) return fs::file_size(path);
  const char* ending = is_model(path) && !holds(path, "model.safetensors") ? ".bin" : ".safetensors";
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (entry.is_regular_file() && entry.path().extension() == ending) bytes += entry.file_size();
  }
  return bytes;
}

/// A model's family, parameters by stored type, the most frequent first, and what its weights take where it computes.
void describe_model(const fs::path& path, const NumberFormat& format, OrderedJson& row) {
  const auto checkpoint = models::open_checkpoint(path);
  std::map<std::string, int64_t> by_type;
  int64_t parameters = 0;
  for (const std::string& name : checkpoint->names()) {
    const std::vector<int64_t> shape = checkpoint->shape(name);
    const int64_t numbers = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    by_type[checkpoint->stored_type(name)] += numbers;
    parameters += numbers;
  }
  std::vector<std::string> types;
  for (const auto& [type, numbers] : by_type) types.push_back(type);
  std::stable_sort(types.begin(), types.end(), [&](const auto& a, const auto& b) { return by_type[a] > by_type[b]; });
  row["family"] = checkpoint->config().at("model_type");
  row["parameters"] = parameters;
  const char* of_folder = holds(path, "model.safetensors") ? "safetensors" : "pytorch";
  row["format"] = path.extension() == ".gguf" ? "gguf" : of_folder;
  row["dtypes"] = types;
  const int64_t bytes = parameters * static_cast<int64_t>(c10::elementSize(format.dtype));
  row["bytes_in_memory"] = bytes;
  row["fits"] = static_cast<uint64_t>(bytes) < memory_of_machine();
}

/// The numbers of a safetensors file.
void describe_numbers(const fs::path& path, OrderedJson& row) {
  const formats::SafetensorsFile file(path);
  int64_t parameters = 0;
  std::set<std::string> types;
  for (const std::string& name : file.names()) {
    const std::vector<int64_t> shape = file.shape(name);
    parameters += std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    types.insert(dtype_name(file.dtype(name)));
  }
  row["parameters"] = parameters;
  row["format"] = "safetensors";
  row["dtypes"] = types;
}

void describe_adapter(const fs::path& path, OrderedJson& row) {
  const OrderedJson config = formats::read_adapter_config(path);
  const std::string where = (path / "adapter_config.json").string();
  row["family"] = adapters::method_of_peft_type(get<std::string>(Json(config), "peft_type", where), where).name;
  const bool here = formats::is_there(path / "adapter_config.json");
  describe_numbers((here ? path : path / "default") / "adapter_model.safetensors", row);
  row["base"] = get_or<std::string>(Json(config), "base_model_name_or_path", "", where);
  row["base_found"] = run::base_of(path).string();
}

void describe_composition(const fs::path& path, OrderedJson& row) {
  const Json config = read_json(path / "calm_config.json");
  const std::string where = (path / "calm_config.json").string();
  auto model = [&](const Json& member) { return (path / get<std::string>(member, "model", where)).lexically_normal(); };
  row["family"] = "calm";
  describe_numbers(path / "calm_model.safetensors", row);
  row["base"] = model(get<Json>(config, "anchor", where)).string();
  row["augmenting"] = OrderedJson::array();
  for (const Json& member : get<std::vector<Json>>(config, "augmenting", where)) {
    row["augmenting"].push_back(model(member).string());
  }
}

/// What can't be read is listed with the reason.
OrderedJson describe(const fs::path& path, const NumberFormat& format) {
  OrderedJson row{{"path", path.string()}, {"kind", "model"}};
  try {
    if (formats::is_adapter(path)) row["kind"] = "adapter";
    if (compose::is_composition(path)) row["kind"] = "composition";
    row["bytes_on_disk"] = bytes_on_disk(path);
    if (row["kind"] == "adapter") {
      describe_adapter(path, row);
    } else if (row["kind"] == "composition") {
      describe_composition(path, row);
    } else {
      describe_model(path, format, row);
    }
  } catch (const Error& error) {
    row["problem"] = error.what();
  }
  return row;
}

/// A row's cells for a terminal.
std::vector<std::string> cells(const OrderedJson& row) {
  auto text = [&](const char* key) {
    return row.contains(key) ? visible_in_line(row[key].get<std::string>()) : std::string();
  };
  auto mib = [](const OrderedJson& bytes) { return fmt::format("{:.1f} MiB", bytes.get<double>() / kMib); };
  std::string numbers, format, last = text("problem");
  if (row.contains("dtypes")) {
    numbers = format_count(row["parameters"].get<double>());
    format = fmt::format("{} {}", text("format"), fmt::join(row["dtypes"].get<std::vector<std::string>>(), " "));
  }
  if (row.contains("fits")) {
    last =
        fmt::format("{} in memory: {}", mib(row["bytes_in_memory"]), row["fits"].get<bool>() ? "fits" : "does not fit");
  } else if (row.contains("base") && last.empty()) {
    last = "of " + text(row.contains("base_found") ? "base_found" : "base");
    for (const OrderedJson& member : row.value("augmenting", OrderedJson::array())) {
      last += " + " + visible_in_line(member.get<std::string>());
    }
  }
  return {text("path"),
          text("kind"),
          text("family"),
          numbers,
          row.contains("bytes_on_disk") ? mib(row["bytes_on_disk"]) : "",
          format,
          last};
}

void show(const OrderedJson& rows, const NumberFormat& format) {
  std::vector<std::vector<std::string>> table{{"path", "kind", "family", "parameters", "on disk", "format", ""}};
  for (const OrderedJson& row : rows) table.push_back(cells(row));
  std::vector<size_t> widths(table[0].size());
  for (const auto& row : table) {
    for (size_t i = 0; i + 1 < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : table) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) line += fmt::format("{:<{}}  ", row[i], widths[i]);
    say("{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
  }
  say("This machine has {:.1f} GiB for weights, which would be {}: {}.\n",
      static_cast<double>(memory_of_machine()) / (kMib * 1024), dtype_name(format.dtype), format.reason);
}

int run_models(const Options& options, const CommonOptions& common) {
  const NumberFormat format = number_format(common.dtype, parse_device(common.device));
  std::vector<std::string> folders = options.folders;
  for (const std::string& folder : folders) {
    MOESAIC_CHECK(fs::exists(folder), UsageError, "models {}: no such file or folder", folder);
  }
  const bool usual = folders.empty();
  if (usual) {
    for (const char* folder : {".cache/models", ".", "runs"}) {
      if (fs::is_directory(folder)) folders.emplace_back(folder);
    }
  }
  OrderedJson rows = OrderedJson::array();
  for (const std::string& folder : folders) {
    for (const fs::path& path : found_in(folder)) rows.push_back(describe(path, format));
  }
  if (options.json) {
    say("{}\n", rows.dump(2, ' ', false, OrderedJson::error_handler_t::replace));
    return 0;
  }
  if (rows.empty()) {
    say("No model, adapter or composition in {}.\n", fmt::join(folders, ", "));
  } else {
    show(rows, format);
  }
  if (usual && !fs::exists(kDemoModel)) {
    say("The demo's model is not here; this fetches it: tools/models smollm2-135m-instruct\n");
  }
  return 0;
}

}  // namespace

Runner add_models(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  app.add_option("folders", options->folders,
                 "Folders to look into, not below their children; default: .cache/models, this folder and runs");
  app.add_flag("--json", options->json, "Print as JSON");
  return [options, &common] { return run_models(*options, common); };
}

}  // namespace moesaic::cli
