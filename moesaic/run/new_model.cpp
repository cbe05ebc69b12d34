#include "moesaic/run/new_model.h"

#include "moesaic/data/texts.h"
#include "moesaic/models/registry.h"
#include "moesaic/tokenizer/tokenizer.h"
#include "moesaic/train/checkpoint.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostTrainingText = size_t{64} << 20;  // bytes that a tokenizer is trained on

/// A configuration with another tokenizer and no weights.
class BlankCheckpoint : public formats::Checkpoint {
 public:
  BlankCheckpoint(const Checkpoint& model, Json config, formats::TokenizerFiles tokenizer)
      : tokenizer_(std::move(tokenizer)) {
    path_ = model.path();
    config_ = std::move(config);
  }
  std::vector<std::string> names() const override { return {}; }
  bool contains(const std::string&) const override { return false; }
  std::vector<int64_t> shape(const std::string& name) const override { no_weights(name); }
  at::ScalarType dtype(const std::string& name) const override { no_weights(name); }
  at::Tensor tensor(const std::string& name) const override { no_weights(name); }
  void read_into(const std::string& name, at::Tensor) const override { no_weights(name); }
  std::optional<std::string> tokenizer_json() const override { return tokenizer_.json; }
  Json tokenizer_config() const override { return tokenizer_.config; }
  formats::ChatTemplates chat_templates() const override { return tokenizer_.chat_templates; }
  Json generation_config() const override { return Json::object(); }
  std::string fingerprint() const override { return ""; }

 private:
  [[noreturn]] void no_weights(const std::string& name) const {
    throw DataError(fmt::format("{}: has no tensor '{}': it is made from nothing", path_.string(), name));
  }
  formats::TokenizerFiles tokenizer_;
};

/// `path`: a folder with tokenizer.json, that file itself, or a .gguf file.
formats::TokenizerFiles read_tokenizer(const fs::path& path) {
  if (path.extension() == ".gguf") {
    const auto checkpoint = models::open_checkpoint(path, false);
    auto files = checkpoint->tokenizer_files();
    MOESAIC_CHECK(files.json, DataError, "{}: holds no tokenizer", path.string());
    return files;
  }
  const fs::path file = fs::is_directory(path) ? path / "tokenizer.json" : path;
  MOESAIC_CHECK(fs::is_regular_file(file), DataError,
                "tokenizer: {}: no such file; expected a folder with tokenizer.json, that file, or a .gguf file",
                file.string());
  auto files = formats::read_tokenizer_files(file.parent_path());
  files.json = read_file(file, size_t{256} << 20);
  return files;
}

/// The output folder of the run that this one goes on with, if it left its tokenizer there.
std::optional<fs::path> resumed_folder(const train::TrainConfig& config) {
  fs::path folder;
  if (config.resume_from_checkpoint == "auto") {
    if (train::newest_checkpoint(config.output_dir)) folder = config.output_dir;
  } else if (config.resume_from_checkpoint != "none") {
    folder = fs::path(config.resume_from_checkpoint).lexically_normal();
    if (!folder.has_filename()) folder = folder.parent_path();  // "out/checkpoint-5/"
    folder = folder.parent_path();
    if (folder.empty()) folder = ".";
  }
  if (folder.empty() || !fs::exists(folder / "tokenizer.json")) return std::nullopt;
  return folder;
}

}  // namespace

NewModel open_new_model(const RunConfig& run) {
  fs::path folder = run.model_name_or_path;
  if (folder.filename() == "config.json") folder = folder.has_parent_path() ? folder.parent_path() : ".";
  const auto model = models::open_checkpoint(folder, false);
  const int64_t config_vocabulary = get_or<int64_t>(model->config(), "vocab_size", 0, folder.string());
  auto check_size = [&](int64_t tokens, const std::string& where) {
    MOESAIC_CHECK(tokens <= config_vocabulary, DataError,
                  "{}: config.json has a vocab_size of {}, expected at least the {} tokens of {}\nhint: leave "
                  "vocab_size out of config.json, and it follows the tokenizer that the run's key `tokenizer` gives",
                  folder.string(), config_vocabulary, tokens, where);
  };
  if (run.tokenizer.empty() && run.tokenizer_vocab_size == 0) {
    MOESAIC_CHECK(model->tokenizer_json(), DataError,
                  "{}: no tokenizer found, expected tokenizer.json beside config.json\nhint: the run's key `tokenizer` "
                  "names one, or {{train: bpe, vocab_size: N}} trains one on the run's texts",
                  folder.string());
    check_size(tokenizer::Tokenizer::open(*model)->vocab_size(), "the tokenizer beside it");
    return {model, ""};
  }

  std::string origin;
  formats::TokenizerFiles files;
  if (const auto begun = resumed_folder(run.train)) {
    origin = fmt::format("from {}, as the run began", begun->string());
    files = read_tokenizer(*begun);
  } else if (!run.tokenizer.empty()) {
    origin = "from " + run.tokenizer;
    files = read_tokenizer(run.tokenizer);
  } else {
    const auto datasets =
        data::train_validation(data::resolve_datasets(run.dataset, run.dataset_dir), run.val_size, run.train.seed)
            .first;
    const std::vector<std::string> texts = data::plain_texts(datasets, kMostTrainingText);
    const auto trained = tokenizer::Tokenizer::train(texts, run.tokenizer_vocab_size);
    origin = fmt::format("trained on {} texts", texts.size());
    if (trained->vocab_size() < run.tokenizer_vocab_size) {
      origin += fmt::format(", which give no more of the {} asked for", run.tokenizer_vocab_size);
    }
    files = {trained->json(), trained->config(), model->chat_templates()};
  }
  const tokenizer::Tokenizer tokenizer(*files.json, files.config, origin);
  const int64_t tokens = tokenizer.vocab_size();
  if (config_vocabulary > 0 && !run.tokenizer.empty()) check_size(tokens, run.tokenizer);
  const int64_t vocabulary = run.tokenizer.empty() ? tokens : std::max(tokens, config_vocabulary);
  Json config = model->config();
  config["vocab_size"] = vocabulary;
  auto follow = [&](const char* key, std::optional<int64_t> id) {
    config.erase(key);
    if (id) config[key] = *id;
  };
  follow("bos_token_id", tokenizer.bos_id());
  follow("eos_token_id", tokenizer.eos_id());
  const auto pad = tokenizer.special_tokens().find("pad_token");
  follow("pad_token_id", pad == tokenizer.special_tokens().end() ? std::nullopt : tokenizer.token_to_id(pad->second));
  return {std::make_shared<BlankCheckpoint>(*model, std::move(config), std::move(files)),
          fmt::format("{} tokens, {}; config.json follows: vocab_size {}{}{}", tokens, origin, vocabulary,
                      tokenizer.bos_id() ? fmt::format(", bos {}", *tokenizer.bos_id()) : "",
                      tokenizer.eos_id() ? fmt::format(", eos {}", *tokenizer.eos_id()) : "")};
}

}  // namespace moesaic::run
