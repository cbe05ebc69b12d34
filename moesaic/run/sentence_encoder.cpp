#include "moesaic/run/sentence_encoder.h"

#include <fcntl.h>
#include <unistd.h>

#include <unordered_map>

#include "moesaic/base/check.h"
#include "moesaic/base/file_memory.h"
#include "moesaic/base/json.h"
#include "moesaic/base/sha256.h"
#include "moesaic/formats/safetensors.h"
#include "moesaic/formats/torch_file.h"
#include "moesaic/models/registry.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;

constexpr size_t kKey = 64;  // hex digits of a text's hash

/// Vectors of `width` numbers by key in one file: records of a key and its numbers, appended.
class VectorFile {
 public:
  /// `path` empty: nothing is kept.
  VectorFile(const fs::path& path, int64_t width) : width_(width) {
    if (path.empty()) return;
    std::error_code error;
    fs::create_directories(path.parent_path(), error);
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (descriptor_ < 0) return;  // the vectors are made again
    std::string key(kKey, '\0');
    const off_t end = ::lseek(descriptor_, 0, SEEK_END);
    for (off_t at = 0; at + record() <= end; at += record()) {
      if (::pread(descriptor_, key.data(), kKey, at) == static_cast<ssize_t>(kKey)) places_[key] = at;
    }
    // Half a record that a process left when it was ended.
    if (end % record() != 0 && ::ftruncate(descriptor_, end - end % record()) != 0) close();
  }
  ~VectorFile() { close(); }
  VectorFile(const VectorFile&) = delete;
  VectorFile& operator=(const VectorFile&) = delete;

  /// Undefined where it is not kept.
  torch::Tensor find(const std::string& key) const {
    const auto place = places_.find(key);
    if (place == places_.end()) return {};
    torch::Tensor vector = torch::empty({width_}, torch::kFloat32);
    const auto bytes = static_cast<ssize_t>(vector.nbytes());
    if (::pread(descriptor_, vector.data_ptr(), vector.nbytes(), place->second + kKey) != bytes) return {};
    return vector.isfinite().all().item<bool>() ? vector : torch::Tensor();
  }

  void add(const std::string& key, const torch::Tensor& vector) {
    constexpr off_t kMost = off_t{1} << 30;
    const off_t end = descriptor_ < 0 ? kMost : ::lseek(descriptor_, 0, SEEK_END);
    if (end + record() > kMost) return;
    std::string bytes = key;
    bytes.append(static_cast<const char*>(vector.data_ptr()), vector.nbytes());
    if (::write(descriptor_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) close();
  }

 private:
  off_t record() const { return static_cast<off_t>(kKey + width_ * sizeof(float)); }
  void close() {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  }

  int64_t width_;
  int descriptor_ = -1;
  std::unordered_map<std::string, off_t> places_;  // of what stood there at first
};

/// What stands behind the encoder.
struct Behind {
  torch::Tensor weight, bias;  // [out, in], [out]; undefined: no dense layer
  bool tanh = false, normalise = false;
  int64_t max_tokens = 0;  // 0 = all

  torch::Tensor operator()(torch::Tensor mean) const {
    if (weight.defined()) mean = at::linear(mean, weight, bias);
    if (tanh) mean = mean.tanh();
    return normalise ? mean / mean.norm().clamp_min(1e-12) : mean;
  }
};

void read_pooling(const fs::path& folder) {
  const Json config = read_json(folder / "config.json");
  for (const auto& [key, value] : config.items()) {
    const bool mean = key == "pooling_mode_mean_tokens";
    const bool other = key.starts_with("pooling_mode") && value == true && !mean;
    MOESAIC_CHECK(!other && (!mean || value == true), DataError,
                  "{}: {}: got {}, expected the mean over tokens (pooling_mode_mean_tokens) alone",
                  (folder / "config.json").string(), key, value.dump());
  }
}

void read_dense(const fs::path& folder, Behind& behind) {
  const std::string where = folder.string();
  const auto activation = get_or<std::string>(read_json(folder / "config.json"), "activation_function", "", where);
  behind.tanh = activation.ends_with("Tanh");
  MOESAIC_CHECK(behind.tanh || activation.ends_with("Identity"), DataError,
                "{}: activation_function: got '{}', expected Identity or Tanh", where, activation);
  formats::TensorMap tensors;
  if (const fs::path file = folder / "model.safetensors"; fs::is_regular_file(file)) {
    const formats::SafetensorsFile stored(file);
    for (const std::string& name : stored.names()) tensors[name] = stored.tensor(name).clone();
  } else {
    tensors = formats::read_torch_file(folder / "pytorch_model.bin");
  }
  const torch::Tensor weight = tensors["linear.weight"], bias = tensors["linear.bias"];
  MOESAIC_CHECK(weight.defined() && weight.dim() == 2, DataError, "{}: has no matrix linear.weight", where);
  behind.weight = weight.to(torch::kFloat32);
  if (bias.defined()) behind.bias = bias.to(torch::kFloat32);
}

Behind read_behind(const fs::path& folder) {
  Behind behind;
  if (const fs::path config = folder / "sentence_bert_config.json"; fs::is_regular_file(config)) {
    behind.max_tokens = get_or<int64_t>(read_json(config), "max_seq_length", 0, config.string());
  }
  const fs::path list = folder / "modules.json";
  if (!fs::is_regular_file(list)) return behind;
  const Json modules = read_json(list);
  MOESAIC_CHECK(modules.is_array(), DataError, "{}: expected a list", list.string());
  for (const Json& module : modules) {
    const auto type = get<std::string>(module, "type", list.string());
    const fs::path part = folder / get_or<std::string>(module, "path", "", list.string());
    if (type.ends_with(".Pooling")) {
      read_pooling(part);
    } else if (type.ends_with(".Dense")) {
      read_dense(part, behind);
    } else if (type.ends_with(".Normalize")) {
      behind.normalise = true;
    } else {
      MOESAIC_CHECK(type.ends_with(".Transformer"), DataError,
                    "{}: got a module {}, expected Transformer, Pooling, Dense and Normalize", list.string(), type);
    }
  }
  return behind;
}

class FolderEncoder : public SentenceEncoder {
 public:
  FolderEncoder(const fs::path& folder, std::shared_ptr<const tokenizer::Tokenizer> model_tokenizer,
                torch::Device device)
      : model_tokenizer_(std::move(model_tokenizer)), behind_(read_behind(folder)) {
    const auto checkpoint = models::open_checkpoint(folder);
    const auto model = models::load_model(*checkpoint, {.device = device, .num_blocks = INT64_MAX});
    model_ = std::dynamic_pointer_cast<models::Seq2SeqLM>(model);
    MOESAIC_CHECK(model_ != nullptr, DataError, "{}: is a {}, expected a model with an encoder, as T5's",
                  folder.string(), model->facts().model_type);
    model_->eval();
    tokenizer_ = tokenizer::Tokenizer::open(*checkpoint);
    for (torch::Tensor* part : {&behind_.weight, &behind_.bias}) {
      if (part->defined()) *part = part->to(device);
    }
    MOESAIC_CHECK(!behind_.weight.defined() || behind_.weight.size(1) == model_->reading_width(), DataError,
                  "{}: its dense layer reads {} numbers, expected the encoder's {}", folder.string(),
                  behind_.weight.size(1), model_->reading_width());
    fingerprint_ = checkpoint->fingerprint();
    if (behind_.weight.defined()) {
      const torch::Tensor weight = behind_.weight.cpu().contiguous();
      Sha256 hash;
      hash.update(fingerprint_);
      hash.update(weight.data_ptr(), weight.nbytes());
      fingerprint_ = hash.hex();
    }
    const fs::path kept = file_memory();
    const std::string name = sha256_hex(fmt::format("{} {} {}", fingerprint_, behind_.normalise, behind_.max_tokens));
    kept_ = std::make_unique<VectorFile>(kept.empty() ? fs::path() : kept / "sentences" / name, width());
  }

  int64_t width() const override { return behind_.weight.defined() ? behind_.weight.size(0) : model_->reading_width(); }
  const std::string& fingerprint() const override { return fingerprint_; }

  torch::Tensor vectors(const std::vector<std::vector<int64_t>>& prompts) override {
    std::vector<torch::Tensor> rows;
    for (const auto& prompt : prompts) rows.push_back(vector_of(model_tokenizer_->decode(prompt, true)));
    return torch::stack(rows);
  }

 private:
  torch::Tensor vector_of(const std::string& text) {
    const std::string key = sha256_hex(text);
    if (const auto known = known_.find(key); known != known_.end()) return known->second;
    torch::Tensor vector = kept_->find(key);
    if (!vector.defined()) {
      vector = encoded(text);
      kept_->add(key, vector);
    }
    return known_[key] = vector;
  }

  torch::Tensor encoded(const std::string& text) {
    torch::NoGradGuard no_grad;
    std::vector<int64_t> ids = tokenizer_->encode(text, /*add_special_tokens=*/true);
    if (const int64_t most = behind_.max_tokens; most > 0 && std::ssize(ids) > most) {
      ids.erase(ids.begin() + most - 1, ids.end() - 1);  // the EOS stays
    }
    MOESAIC_CHECK(!ids.empty(), DataError, "sentence encoder: got no token of the text '{}'", text.substr(0, 80));
    const nn::AlikeRows alike(nn::AlikeRows::Number::kMany);
    nn::Pass pass;
    const torch::Tensor states = model_->encode(nn::RaggedBatch::from_sequences({ids}, model_->device()), pass);
    return behind_(states.mean(0)).cpu().contiguous();
  }

  std::shared_ptr<const tokenizer::Tokenizer> model_tokenizer_, tokenizer_;
  std::shared_ptr<models::Seq2SeqLM> model_;
  Behind behind_;
  std::string fingerprint_;
  std::unordered_map<std::string, torch::Tensor> known_;
  std::unique_ptr<VectorFile> kept_;
};

}  // namespace

std::shared_ptr<SentenceEncoder> open_sentence_encoder(const fs::path& folder,
                                                       std::shared_ptr<const tokenizer::Tokenizer> model_tokenizer,
                                                       torch::Device device) {
  std::error_code error;
  MOESAIC_CHECK(fs::is_directory(folder, error), UsageError,
                "router.sentence_source: got '{}', expected hidden, column, or the folder of a sentence encoder",
                folder.string());
  MOESAIC_CHECK(model_tokenizer != nullptr, UsageError,
                "router.sentence_source: got a sentence encoder for a model without a tokenizer: it reads texts");
  return std::make_shared<FolderEncoder>(folder, std::move(model_tokenizer), device);
}

}  // namespace moesaic::run
