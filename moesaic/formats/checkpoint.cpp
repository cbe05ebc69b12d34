#include "moesaic/formats/checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <mutex>
#include <set>

#include "moesaic/base/file_memory.h"
#include "moesaic/base/sha256.h"
#include "moesaic/formats/bytes.h"
#include "moesaic/formats/config.h"
#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/gguf_checkpoint.h"
#include "moesaic/formats/safetensors.h"
#include "moesaic/formats/torch_file.h"

namespace moesaic::formats {
namespace {

namespace fs = std::filesystem;
constexpr const char* kConfigName = "config.json";
/// How a folder may name its weights; the first that is there is read.
struct WeightNames {
  const char *single, *index, *ending;
};
constexpr WeightNames kSafetensors{"model.safetensors", "model.safetensors.index.json", ".safetensors"};
constexpr WeightNames kPickles{"pytorch_model.bin", "pytorch_model.bin.index.json", ".bin"};
constexpr size_t kMaxListedErrors = 10;
constexpr const char* kFingerprintKind = "sha256-all:";

std::string first_few(const std::vector<std::string>& items) {
  const size_t shown = std::min(items.size(), kMaxListedErrors);
  std::string text = fmt::format("{}", fmt::join(items.begin(), items.begin() + shown, "\n  "));
  if (items.size() > shown) text += fmt::format("\n  ... and {} more", items.size() - shown);
  return text;
}

/// What a folder without config.json probably is.
std::string folder_hint(const fs::path& dir) {
  if (is_there(dir / "adapter_config.json")) return " It is an adapter's folder: give it as the adapter.";
  if (is_there(dir / "calm_config.json")) return " It is a composition; expected a single model here.";
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (entry.path().extension() == ".gguf") return fmt::format(" Did you mean '{}'?", entry.path().string());
    if (entry.path().filename().string().starts_with("checkpoint-")) {
      return " It is of a training run that has not ended: go on with `moesaic train RUN --resume auto`.";
    }
  }
  return "";
}

/// A shard's name from the index: a plain file name, so that an index can't reach outside of its folder.
bool is_plain_shard_name(const std::string& name, const char* ending) {
  return name.ends_with(ending) && name.find_first_of("/\\") == std::string::npos && name[0] != '.' &&
         name.find('\0') == std::string::npos && name.size() < 256;
}

/// One file of weights: safetensors, or torch.save's, whose tensors are views of the mapped file.
class WeightFile {
 public:
  explicit WeightFile(const fs::path& path) {
    if (path.extension() == ".safetensors") {
      safetensors_.emplace(path);
      return;
    }
    mapped_ = Bytes::map(path);
    pickled_ = read_torch_file(mapped_);
    std::set<const void*> seen;
    for (const auto& [name, tensor] : pickled_) {
      if (tensor.numel() > 0 && !seen.insert(tensor.const_data_ptr()).second) repeats_.insert(name);
    }
  }

  std::vector<std::string> names() const {
    if (safetensors_) return safetensors_->names();
    std::vector<std::string> names;
    for (const auto& [name, _] : pickled_) names.push_back(name);
    return names;
  }
  bool contains(const std::string& name) const {
    return safetensors_ ? safetensors_->contains(name) : pickled_.contains(name);
  }
  std::vector<int64_t> shape(const std::string& name) const {
    return safetensors_ ? safetensors_->shape(name) : pickled_.at(name).sizes().vec();
  }
  at::ScalarType dtype(const std::string& name) const {
    return safetensors_ ? safetensors_->dtype(name) : pickled_.at(name).scalar_type();
  }
  at::Tensor tensor(const std::string& name) const {
    if (safetensors_) return safetensors_->tensor(name);
    // A tied weight is a view of another's numbers, and a copy to whoever writes both.
    return repeats_.contains(name) ? pickled_.at(name).clone() : pickled_.at(name);
  }
  /// The numbers, one row behind the other. `kept` holds them where the file has them otherwise.
  std::string_view bytes(const std::string& name, at::Tensor& kept) const {
    if (safetensors_) return safetensors_->bytes(name);
    kept = pickled_.at(name).contiguous();
    return bytes_of(kept);
  }
  /// Gives back the memory of a tensor that has been copied.
  void release(const std::string& name) const {
    if (safetensors_) return safetensors_->release(name);
    const std::string_view bytes = bytes_of(pickled_.at(name));
    const auto* first = reinterpret_cast<const uint8_t*>(bytes.data());
    const bool of_file = first >= mapped_.data && first < mapped_.data + mapped_.size;  // else it was copied already
    if (of_file && pickled_.at(name).is_contiguous()) mapped_.release(bytes);
  }

 private:
  static std::string_view bytes_of(const at::Tensor& tensor) {
    return {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()};
  }

  std::optional<SafetensorsFile> safetensors_;
  Bytes mapped_;
  TensorMap pickled_;
  std::set<std::string> repeats_;
};

class FolderCheckpoint : public Checkpoint {
 public:
  FolderCheckpoint(const fs::path& dir, bool weights) {
    path_ = dir;
    MOESAIC_CHECK(is_there(dir / kConfigName), DataError, "{}: has no {}.{}", dir.string(), kConfigName,
                  folder_hint(dir));
    const Json raw = read_json(dir / kConfigName, size_t{16} << 20);
    config_ = normalise_config(raw, (dir / kConfigName).string());
    if (weights) {
      open_weights();
      rename_tensors(raw.contains("text_config"));
      unstack_experts();
    }
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, _] : tensors_) names.push_back(name);
    return names;
  }
  bool contains(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override {
    const Location& at = location(name);
    std::vector<int64_t> shape = at.file->shape(at.stored_name);
    return at.count < 0 ? shape : std::vector{at.count, shape.back()};
  }
  at::ScalarType dtype(const std::string& name) const override {
    const Location& at = location(name);
    return at.file->dtype(at.stored_name);
  }
  at::Tensor tensor(const std::string& name) const override {
    const Location& at = location(name);
    const at::Tensor whole = at.file->tensor(at.stored_name);
    return at.count < 0 ? whole : whole.reshape({-1, whole.size(-1)}).narrow(0, at.begin, at.count);
  }

  void read_into(const std::string& name, at::Tensor destination) const override {
    const at::Tensor stored = tensor(name);
    MOESAIC_CHECK(destination.sizes() == stored.sizes(), ShapeError, "{}: tensor '{}': got shape {}, expected {}",
                  path_.string(), name, fmt::join(stored.sizes(), "x"), fmt::join(destination.sizes(), "x"));
    const at::NoGradGuard no_grad;
    destination.copy_(stored);
    release(name);
  }

  std::optional<std::string> tokenizer_json() const override { return read_tokenizer_json(path_); }

  Json tokenizer_config() const override { return read_tokenizer_config(path_); }
  ChatTemplates chat_templates() const override {
    ChatTemplates templates = read_chat_templates(path_);
    return templates == kNoTemplate ? ChatTemplates() : templates;
  }

  Json generation_config() const override { return read_optional_json(path_ / "generation_config.json"); }

  std::string fingerprint() const override {
    std::call_once(fingerprint_once_, [this] {
      fingerprint_ = remembered("fingerprint of every byte", paths_, [this] {
        auto all = fingerprint_of(names(), [this](const std::string& name) {
          const Location& at = location(name);
          StoredTensor tensor{c10::toString(dtype(name)), shape(name), {}, {}};
          tensor.bytes = at.file->bytes(at.stored_name, tensor.kept);
          if (at.count >= 0) {
            const size_t row = tensor.bytes.size() / static_cast<size_t>(rows_of(at));
            tensor.bytes = tensor.bytes.substr(at.begin * row, at.count * row);
          }
          return tensor;
        });
        for (const std::string& name : names()) release(name);
        return all;
      });
    });
    return fingerprint_;
  }

 private:
  struct Location {
    const WeightFile* file;
    std::string stored_name;
    int64_t begin = 0, count = -1;  // rows of it, or the whole; see StoredRows
  };

  const Location& location(const std::string& name) const {
    const auto it = tensors_.find(name);
    MOESAIC_CHECK(it != tensors_.end(), DataError, "{}: has no tensor '{}'", path_.string(), name);
    return it->second;
  }
  static int64_t rows_of(const Location& at) {
    const std::vector<int64_t> shape = at.file->shape(at.stored_name);
    return std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies());
  }
  void release(const std::string& name) const { location(name).file->release(location(name).stored_name); }

  void open_weights() {
    for (const WeightNames& kind : {kSafetensors, kPickles}) {
      if (is_there(path_ / kind.single)) {
        files_.push_back(std::make_unique<WeightFile>(path_ / kind.single));
        paths_.push_back(path_ / kind.single);
        for (const auto& name : files_[0]->names()) tensors_.emplace(name, Location{files_[0].get(), name});
      } else if (is_there(path_ / kind.index)) {
        open_shards(kind);
      }
      if (!paths_.empty()) break;
    }
    MOESAIC_CHECK(!paths_.empty(), DataError, "{}: has no {}, no {} and no {}", path_.string(), kSafetensors.single,
                  kSafetensors.index, kPickles.single);
    MOESAIC_CHECK(!tensors_.empty(), FormatError, "{}: the weights hold no tensor", path_.string());
  }

  void open_shards(const WeightNames& kind) {
    const std::string where = (path_ / kind.index).string();
    const Json index = read_json(path_ / kind.index, size_t{256} << 20);
    const auto map = index.find("weight_map");
    MOESAIC_CHECK(map != index.end() && map->is_object(), FormatError, "{}: has no weight_map object", where);

    std::map<std::string, const WeightFile*> shards;
    std::vector<std::string> errors;
    for (const auto& [name, shard] : map->items()) {
      if (!shard.is_string() || !is_plain_shard_name(shard.get<std::string>(), kind.ending)) {
        errors.push_back(fmt::format("tensor '{}' names the shard {}, expected a {} file of the same folder", name,
                                     shard.dump().substr(0, 120), kind.ending));
        continue;
      }
      shards.emplace(shard.get<std::string>(), nullptr);
    }
    for (const auto& [shard, _] : shards) {
      if (!is_there(path_ / shard)) errors.push_back(fmt::format("shard '{}' is missing", shard));
    }
    MOESAIC_CHECK(errors.empty(), FormatError, "{}:\n  {}", where, first_few(errors));

    for (auto& [shard, file] : shards) {
      files_.push_back(std::make_unique<WeightFile>(path_ / shard));
      paths_.push_back(path_ / shard);
      file = files_.back().get();
      for (const auto& name : file->names()) {
        if (!tensors_.emplace(name, Location{file, name}).second) {
          errors.push_back(fmt::format("tensor '{}' stands in more than one shard", name));
        }
        if (!map->contains(name)) {
          errors.push_back(fmt::format("tensor '{}' stands in shard '{}' but not in the index", name, shard));
        }
      }
    }
    for (const auto& [name, shard] : map->items()) {
      if (!shards[shard.get<std::string>()]->contains(name)) {
        errors.push_back(fmt::format("tensor '{}' is missing in shard '{}'", name, shard.get<std::string>()));
      }
    }
    MOESAIC_CHECK(errors.empty(), FormatError, "{}:\n  {}", where, first_few(errors));
  }

  /// From the stored names to those of a plain decoder; drops what only old or multi-modal files carry.
  void rename_tensors(bool multi_modal) {
    const bool headless = tensors_.contains("embed_tokens.weight");  // saved from AutoModel: no "model." prefix
    std::map<std::string, Location> renamed;
    for (auto& [stored, location] : tensors_) {
      std::string name = multi_modal ? language_model_name(stored) : stored;
      if (headless && !name.starts_with("lm_head.")) name = "model." + name;
      if (name.empty() || name.ends_with(".rotary_emb.inv_freq")) continue;
      MOESAIC_CHECK(renamed.emplace(name, location).second, FormatError, "{}: two tensors mean '{}'; one is '{}'",
                    path_.string(), name, stored);
    }
    tensors_ = std::move(renamed);
  }

  void unstack_experts() {
    const Json type = config_.value("model_type", Json());
    const auto names = type.is_string() ? expert_names(type.get<std::string>()) : std::nullopt;
    if (!names) return;
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& [name, at] : tensors_) shapes[name] = at.file->shape(at.stored_name);
    std::map<std::string, Location> apart;
    for (const auto& [name, rows] : unstacked(*names, shapes, path_.string())) {
      const Location& at = tensors_.at(rows.stored);
      apart[name] = {at.file, at.stored_name, rows.begin, rows.count};
    }
    tensors_ = std::move(apart);
  }

  std::vector<std::unique_ptr<WeightFile>> files_;
  std::vector<fs::path> paths_;  // of these
  std::map<std::string, Location> tensors_;
  mutable std::once_flag fingerprint_once_;
  mutable std::string fingerprint_;
};

}  // namespace

std::string fingerprint_of(const std::vector<std::string>& names,
                           const std::function<StoredTensor(const std::string&)>& stored) {
  std::vector<std::string> digests(names.size());
  at::parallel_for(0, std::ssize(names), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const StoredTensor tensor = stored(names[i]);
      Sha256 hash;
      hash.update(fmt::format("{}\n{}\n{}\n", names[i], tensor.dtype, fmt::join(tensor.shape, ",")));
      hash.update(tensor.bytes);
      digests[i] = hash.hex();
    }
  });
  Sha256 all;
  for (const auto& digest : digests) all.update(digest);
  return kFingerprintKind + all.hex();
}

bool may_be_same_weights(const std::string& fingerprint, const std::string& other) {
  auto is_of_sample = [](const std::string& text) { return text.starts_with("sha256:"); };
  return fingerprint == other ||
         (!fingerprint.empty() && !other.empty() && is_of_sample(fingerprint) != is_of_sample(other));
}

std::shared_ptr<Checkpoint> open_folder(const fs::path& path, bool weights) {
  return std::make_shared<FolderCheckpoint>(path, weights);
}

}  // namespace moesaic::formats
