// The `dataset:` key of a run and LLaMA-Factory's dataset_info.json, resolved to files.
#include <algorithm>

#include "moesaic/data/dataset.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kItemKeys{"name",       "weight",  "cap",  "split",     "val_size",
                                         "formatting", "columns", "tags", "templates", "prompts"};
// Keys of LLaMA-Factory's registry; those we can't honour are refused below.
const std::vector<std::string> kInfoKeys{"file_name",  "formatting",      "columns",    "tags",       "num_samples",
                                         "split",      "ranking",         "hf_hub_url", "ms_hub_url", "om_hub_url",
                                         "script_url", "cloud_file_name", "subset",     "folder"};

void check_keys(const Json& object, const std::vector<std::string>& known, const std::string& where) {
  MOESAIC_CHECK(object.is_object(), UsageError, "{}: expected an object, got {}", where, object.dump().substr(0, 80));
  for (const auto& item : object.items()) {
    if (std::find(known.begin(), known.end(), item.key()) != known.end()) continue;
    std::string near = nearest_name(item.key(), known);
    throw UsageError(fmt::format("{}: unknown key '{}'{}; known: {}", where, item.key(),
                                 near.empty() ? "" : fmt::format(", did you mean '{}'?", near),
                                 fmt::join(known, ", ")));
  }
}

/// dataset_info.json's entry `name`.
DatasetConfig from_registry(const std::string& name, const Json& info, const fs::path& dataset_dir) {
  const std::string where = fmt::format("{}: '{}'", (dataset_dir / "dataset_info.json").string(), name);
  check_keys(info, kInfoKeys, where);
  MOESAIC_CHECK(info.contains("file_name"), UsageError,
                "{}: has no file_name; data sets are read from files only, download it and name the file", where);
  MOESAIC_CHECK(!get_or<bool>(info, "ranking", false, where), UsageError, "{}: ranking data can't be trained on",
                where);
  DatasetConfig config;
  config.name = name;
  config.path = dataset_dir / get<std::string>(info, "file_name", where);
  config.columns = get_or<Json>(info, "columns", Json::object(), where);
  config.tags = get_or<Json>(info, "tags", Json::object(), where);
  // LLaMA-Factory's default is alpaca; it matters only where columns are renamed.
  config.formatting = get_or<std::string>(info, "formatting", config.columns.empty() ? "auto" : "alpaca", where);
  config.cap = get_or<int64_t>(info, "num_samples", 0, where);
  return config;
}

/// The folder of a data set's training split, when datasets' DatasetDict.save_to_disk wrote `folder`; else `folder`.
fs::path training_split(const fs::path& folder) {
  const fs::path list = folder / "dataset_dict.json";
  std::error_code error;
  if (!fs::is_regular_file(list, error)) return folder;
  const auto splits = get<std::vector<std::string>>(read_json(list), "splits", list.string());
  MOESAIC_CHECK(std::find(splits.begin(), splits.end(), "train") != splits.end(), UsageError,
                "{}: got a folder of the splits {} without one named train; name the folder of one of them",
                folder.string(), fmt::join(splits, ", "));
  return folder / "train";
}

/// `whole`: a folder is one data set, however many files it lies in.
std::vector<DatasetConfig> find_datasets(const std::string& name, const Json& registry, const fs::path& dataset_dir,
                                         bool whole) {
  if (registry.contains(name)) return {from_registry(name, registry[name], dataset_dir)};
  for (fs::path path : {dataset_dir / name, fs::path(name)}) {
    std::error_code error;
    if (fs::is_directory(path, error)) path = training_split(path);
    // What save_to_disk wrote is one data set, however many files it lies in.
    if (fs::is_regular_file(path, error) || (whole ? fs::is_directory(path, error) : is_saved_dataset(path))) {
      DatasetConfig config;
      config.name = name;
      config.path = path;
      return {config};
    }
    if (fs::is_directory(path, error)) {
      std::vector<DatasetConfig> configs;
      for (const fs::path& file : data_files(path)) {
        DatasetConfig config;
        config.name = file.stem().string();
        config.path = file;
        configs.push_back(std::move(config));
      }
      return configs;
    }
  }
  std::vector<std::string> known;
  for (const auto& item : registry.items()) known.push_back(item.key());
  std::string near = nearest_name(name, known);
  throw UsageError(fmt::format("dataset '{}': neither a name in {} nor a file{}{}", name,
                               (dataset_dir / "dataset_info.json").string(),
                               near.empty() ? "" : fmt::format("; did you mean '{}'?", near),
                               known.empty() ? "" : fmt::format("; known: {}", fmt::join(known, ", "))));
}

/// The templates that `prompts` names: a templates.yaml, the folder of one, or a folder like promptsource's own, where
/// that of data set `name` is.
std::shared_ptr<const PromptTemplates> find_prompts(const std::string& prompts, const std::string& name,
                                                    const fs::path& dataset_dir) {
  for (const fs::path& path : {dataset_dir / prompts, fs::path(prompts)}) {
    for (const fs::path& file : {path, path / "templates.yaml", path / name / "templates.yaml"}) {
      std::error_code error;
      if (fs::is_regular_file(file, error)) return std::make_shared<PromptTemplates>(PromptTemplates::load(file));
    }
  }
  throw UsageError(
      fmt::format("dataset '{}': prompts is '{}', expected a templates.yaml of promptsource, a folder with one, or a "
                  "folder where {}/templates.yaml is\nhint: the package's own folder is promptsource/templates",
                  name, prompts, name));
}

/// `config` once for each of the templates that `prompts` names.
std::vector<DatasetConfig> with_prompts(const DatasetConfig& config, const std::string& prompts,
                                        const fs::path& dataset_dir) {
  const std::string where = "dataset '" + config.name + "'";
  Json columns = config.columns;
  columns.erase("sentence");
  MOESAIC_CHECK(config.formatting == "auto" && columns.empty() && config.tags.empty() && config.templates == 1,
                UsageError,
                "{}: got formatting, columns, tags or templates beside prompts, expected none: the templates name the "
                "fields of raw rows, and are counted",
                where);
  DatasetConfig one = config;
  one.prompts = find_prompts(prompts, config.name, dataset_dir);
  one.templates = std::ssize(one.prompts->templates());
  std::vector<DatasetConfig> configs;
  for (one.prompt = 0; one.prompt < one.prompts->templates().size(); ++one.prompt) configs.push_back(one);
  return configs;
}

}  // namespace

std::vector<DatasetConfig> resolve_datasets(const Json& dataset, const fs::path& dataset_dir) {
  Json registry = Json::object();
  // save_to_disk's dataset_info.json describes one data set and is no registry.
  if (fs::path path = dataset_dir / "dataset_info.json"; fs::exists(path) && !is_saved_dataset(dataset_dir)) {
    registry = read_json(path);
    MOESAIC_CHECK(registry.is_object(), DataError, "{}: expected an object of data sets", path.string());
  }
  std::vector<Json> items;
  if (dataset.is_array())
    items.assign(dataset.begin(), dataset.end());
  else
    items.push_back(dataset);

  std::vector<DatasetConfig> configs;
  auto add = [&](const std::string& name, const Json& item) {
    const std::string where = "dataset '" + name + "'";
    const auto prompts = get_or<std::string>(item, "prompts", "", where);
    for (DatasetConfig& config : find_datasets(name, registry, dataset_dir, /*whole=*/!prompts.empty())) {
      config.weight = get_or<double>(item, "weight", config.weight, where);
      config.cap = get_or<int64_t>(item, "cap", config.cap, where);
      config.split = get_or<std::string>(item, "split", config.split, where);
      config.val_size = get_or<double>(item, "val_size", config.val_size, where);
      config.formatting = get_or<std::string>(item, "formatting", config.formatting, where);
      config.columns = get_or<Json>(item, "columns", config.columns, where);
      config.tags = get_or<Json>(item, "tags", config.tags, where);
      config.templates = get_or<int64_t>(item, "templates", config.templates, where);
      MOESAIC_CHECK(!item.contains("weight") || (std::isfinite(config.weight) && config.weight > 0), UsageError,
                    "{}: weight is {}, expected a number above 0", where, config.weight);
      MOESAIC_CHECK(config.templates >= 1, UsageError, "{}: templates is {}, expected 1 or more", where,
                    config.templates);
      if (prompts.empty()) {
        configs.push_back(std::move(config));
      } else {
        for (DatasetConfig& each : with_prompts(config, prompts, dataset_dir)) configs.push_back(std::move(each));
      }
    }
  };
  for (const Json& item : items) {
    if (item.is_string()) {
      std::stringstream names(item.get<std::string>());
      for (std::string name; std::getline(names, name, ',');) {
        name.erase(0, name.find_first_not_of(' '));
        name.erase(name.find_last_not_of(' ') + 1);
        if (!name.empty()) add(name, Json::object());
      }
    } else {
      check_keys(item, kItemKeys, "dataset");
      add(get<std::string>(item, "name", "dataset"), item);
    }
  }
  MOESAIC_CHECK(!configs.empty(), UsageError, "dataset: names no data set");
  return configs;
}

std::pair<std::vector<DatasetConfig>, std::vector<DatasetConfig>> train_validation(std::vector<DatasetConfig> datasets,
                                                                                   double val_size, uint64_t seed) {
  std::vector<DatasetConfig> validation;
  if (val_size == 0) return {std::move(datasets), validation};
  for (DatasetConfig& config : datasets) {
    MOESAIC_CHECK(config.split.empty(), UsageError, "dataset '{}': has a split of its own, so val_size can't cut it",
                  config.name);
    config.val_size = val_size;
    config.split_seed = seed;
    config.split = "validation";
    validation.push_back(config);
    config.split = "train";
  }
  return {std::move(datasets), std::move(validation)};
}

}  // namespace moesaic::data
