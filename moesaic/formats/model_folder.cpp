#include "moesaic/formats/model_folder.h"

#include <ATen/ATen.h>

#include "moesaic/base/file_errors.h"
#include "moesaic/formats/config.h"
#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/finite.h"

namespace moesaic::formats {
namespace {

namespace fs = std::filesystem;
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kHead = "lm_head.weight";
constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

std::string dtype_word(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "float32";
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    case at::kDouble: return "float64";
    default: throw DataError(fmt::format("a model can't be saved as {}", c10::toString(dtype)));
  }
}

/// Names of each shard, filled in name order up to the limit.
std::vector<std::vector<std::string>> plan_shards(const TensorMap& tensors, at::ScalarType dtype, size_t max_bytes,
                                                  size_t& total) {
  std::vector<std::vector<std::string>> shards(1);
  size_t used = 0;
  total = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t element = tensor.is_floating_point() ? c10::elementSize(dtype) : tensor.element_size();
    const size_t bytes = static_cast<size_t>(tensor.numel()) * element;
    if (used > 0 && used + bytes > max_bytes) {
      shards.emplace_back();
      used = 0;
    }
    shards.back().push_back(name);
    used += bytes;
    total += bytes;
  }
  return shards;
}

void write_shard(const fs::path& path, const TensorMap& tensors, const std::vector<std::string>& names,
                 at::ScalarType dtype) {
  TensorMap shard;
  for (const auto& name : names) {
    const at::Tensor& tensor = tensors.at(name);
    shard.emplace(name, tensor.is_floating_point() ? tensor.detach().to(dtype) : tensor);
  }
  save_safetensors(path, shard);
}

bool is_weight_file(const std::string& name) {
  return name == kSingleName || name == kIndexName || (name.starts_with("model-") && name.ends_with(".safetensors"));
}

}  // namespace

void write_model_folder(const fs::path& dir, const ModelFolder& model) {
  TensorMap tensors = stacked(model.config.value("model_type", ""), model.tensors);
  const std::string where = dir.string();
  if (model.config.value("tie_word_embeddings", false) && tensors.contains(kHead) && tensors.contains(kEmbedding)) {
    MOESAIC_CHECK(at::equal(tensors.at(kEmbedding), tensors.at(kHead)), DataError,
                  "{}: tie_word_embeddings is true, but {} differs from {}", where, kHead, kEmbedding);
    tensors.erase(kHead);
  }
  check_finite(tensors, model.dtype, where);
  std::error_code error;
  fs::create_directories(dir, error);
  MOESAIC_CHECK(!error, DataError, "{}: the folder can't be made: {}", where, refusal(error.value()));

  size_t total = 0;
  const auto shards = plan_shards(tensors, model.dtype, model.max_shard_bytes, total);
  std::set<std::string> written;
  if (shards.size() == 1) {
    write_shard(dir / kSingleName, tensors, shards[0], model.dtype);
    written.insert(kSingleName);
  } else {
    Json weight_map = Json::object();
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string file = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
      write_shard(dir / file, tensors, shards[i], model.dtype);
      written.insert(file);
      for (const auto& name : shards[i]) weight_map[name] = file;
    }
    const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    write_file_atomically(dir / kIndexName, index.dump(2) + "\n");
    written.insert(kIndexName);
  }
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    if (is_weight_file(name) && !written.contains(name)) fs::remove(entry.path());
  }

  if (model.config.contains(kRopeMagnitude)) {
    spdlog::warn("{}: config.json says {} = {}, which other programs don't read: transformers has it for yarn alone",
                 where, kRopeMagnitude, model.config[kRopeMagnitude].dump());
  }
  Json config = with_legacy_rope_keys(with_both_expert_counts(model.config));
  config["dtype"] = dtype_word(model.dtype);
  write_file_atomically(dir / "config.json", config.dump(2) + "\n");
  write_tokenizer_files(dir, model.tokenizer);
  if (!model.generation_config.empty()) {
    write_file_atomically(dir / "generation_config.json", model.generation_config.dump(2) + "\n");
  }
}

}  // namespace moesaic::formats
