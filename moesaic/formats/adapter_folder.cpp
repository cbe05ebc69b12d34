#include "moesaic/formats/adapter_folder.h"

#include "moesaic/base/file_errors.h"
#include "moesaic/formats/config.h"

namespace moesaic::formats {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view kPrefix = "base_model.model.";
constexpr const char* kConfigName = "adapter_config.json";
constexpr const char* kTensorsName = "adapter_model.safetensors";

/// `dir` itself, or its `default` sub-folder when the adapter stands there.
fs::path find_adapter(const fs::path& dir) {
  MOESAIC_CHECK(fs::is_directory(dir), DataError, "{}: no such folder; expected one with {} and {}", dir.string(),
                kConfigName, kTensorsName);
  if (is_there(dir / kConfigName)) return dir;
  if (is_there(dir / "default" / kConfigName)) return dir / "default";
  std::vector<std::string> others;
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (is_there(entry.path() / kConfigName)) others.push_back(entry.path().filename().string());
  }
  std::sort(others.begin(), others.end());
  std::string hint;
  if (!others.empty()) {
    hint = fmt::format(" Adapters stand in its sub-folders: {}. Name one.", fmt::join(others, ", "));
  } else if (is_there(dir / "config.json")) {
    hint = " It looks like a whole model.";
  } else if (is_there(dir / "calm_config.json")) {
    hint = " It is a composition: give it as the model.";
  }
  throw DataError(fmt::format("{}: has no {}.{}", dir.string(), kConfigName, hint));
}

OrderedJson parse_config(std::string_view text, const std::string& where) {
  OrderedJson config = parse_ordered_json(text, where + "/" + kConfigName);
  MOESAIC_CHECK(config.is_object(), FormatError, "{}/{}: is not a JSON object", where, kConfigName);
  return config;
}

}  // namespace

bool is_adapter(const fs::path& dir) { return is_there(dir / kConfigName) || is_there(dir / "default" / kConfigName); }

OrderedJson read_adapter_config(const fs::path& dir) {
  const fs::path found = find_adapter(dir);
  return parse_config(read_file(found / kConfigName), found.string());
}

AdapterFolder parse_adapter(std::string_view config_text, Bytes tensors, const std::string& where) {
  AdapterFolder adapter;
  adapter.config = parse_config(config_text, where);
  const SafetensorsFile file(std::move(tensors));
  std::vector<std::string> unprefixed;
  int64_t foreign = 0;
  for (const auto& name : file.names()) {
    if (!name.starts_with(kPrefix)) {
      unprefixed.push_back(name);
      continue;
    }
    const std::string stored = name.substr(kPrefix.size()), own = language_model_name(stored);
    if (own.empty()) {
      ++foreign;
      continue;
    }
    if (adapter.spelling.empty()) adapter.spelling = multi_modal_spelling(stored);
    MOESAIC_CHECK(adapter.tensors.emplace(own, file.tensor(name)).second, FormatError,
                  "{}/{}: two tensors mean '{}'; one is '{}'", where, kTensorsName, own, name);
  }
  if (foreign > 0) {
    spdlog::info("{}: {} tensors belong to the parts of a multi-modal model that read no text; they are left out",
                 where, foreign);
  }
  MOESAIC_CHECK(
      unprefixed.empty(), FormatError, "{}/{}: every name must begin with '{}', got {}: {}{}", where, kTensorsName,
      kPrefix, unprefixed.size(),
      fmt::join(unprefixed.begin(), unprefixed.begin() + std::min<ptrdiff_t>(5, std::ssize(unprefixed)), ", "),
      unprefixed.size() > 5 ? ", ..." : "");
  return adapter;
}

AdapterFolder read_adapter_folder(const fs::path& dir) {
  const fs::path found = find_adapter(dir);
  if (!is_there(found / kTensorsName)) {
    MOESAIC_CHECK(!is_there(found / "adapter_model.bin"), DataError,
                  "{0}: holds adapter_model.bin, a pickle, which is not read. Convert it:\n"
                  "  python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{0}/adapter_model.bin', "
                  "weights_only=True, map_location='cpu'), '{0}/{1}')\"",
                  found.string(), kTensorsName);
    throw DataError(fmt::format("{}: has no {}", found.string(), kTensorsName));
  }
  return parse_adapter(read_file(found / kConfigName), Bytes::map(found / kTensorsName), found.string());
}

void write_adapter_folder(const fs::path& dir, const AdapterFolder& adapter) {
  std::error_code error;
  fs::create_directories(dir, error);
  MOESAIC_CHECK(!error, DataError, "{}: the folder can't be made: {}", dir.string(), refusal(error.value()));
  TensorMap prefixed;
  for (const auto& [name, tensor] : adapter.tensors) {
    prefixed.emplace(std::string(kPrefix) + spelled(adapter.spelling, name), tensor);
  }
  save_safetensors(dir / kTensorsName, prefixed);
  write_file_atomically(dir / kConfigName, adapter.config.dump(2) + "\n");
}

}  // namespace moesaic::formats
