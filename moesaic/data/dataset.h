// Datasets: files in the shapes people have them, rendered and tokenised by the one renderer.
#pragma once
#include <filesystem>
#include <memory>

#include "moesaic/data/example.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::data {

/// One source of a mixture.
struct DatasetConfig {
  std::string name;                  // a name in dataset_info.json, or a path
  std::filesystem::path path;        // resolved file
  std::string formatting = "auto";   // auto | alpaca | sharegpt | messages | inputs_targets | text | superni
  Json columns = Json::object();     // LLaMA-Factory's column mapping
  Json tags = Json::object();
  double weight = -1;                // relative rate in the mixture; -1 = its number of rows (capped)
  int64_t cap = 0;                   // rows at most; 0 = all
  std::string split;                 // "train" | "validation" | "" (all)
};

/// How rows become examples.
struct RenderOptions {
  int64_t cutoff_len = 1024;         // tokens of a whole example; the excess is cut from the prompt's left... see .cpp
  int64_t target_cutoff_len = 0;     // tokens of the answer (inputs/targets); 0 = no separate limit
  std::string template_name = "auto";  // auto: the tokenizer's chat template; none: raw prompt + answer + EOS
  bool train_on_prompt = false;
  std::string sentence_column;       // column with a list of numbers for router input `sentence`
};

/// A row in one form, whatever the file's shape.
struct Row {
  OrderedJson messages;              // chat shapes: [{role, content}]; null for raw shapes
  std::string prompt, target;        // inputs/targets and text (empty prompt)
  OrderedJson tools;
  std::vector<float> sentence;
  std::string id;
};

/// Renders and tokenises rows. One object serves training, preview and evaluation.
class Renderer {
 public:
  Renderer(std::shared_ptr<const tokenizer::Tokenizer> tokenizer, std::shared_ptr<const tokenizer::ChatTemplate> chat,
           RenderOptions options);
  /// nullopt when nothing is left to train on after cutting.
  std::optional<Example> render(const Row& row) const;
  /// The prompt of a conversation that a model is asked to answer, tokenised.
  std::vector<int64_t> render_prompt(const OrderedJson& messages, const OrderedJson& tools = nullptr) const;
  const tokenizer::Tokenizer& tokenizer() const { return *tokenizer_; }
  const RenderOptions& options() const { return options_; }

 private:
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
  std::shared_ptr<const tokenizer::ChatTemplate> chat_;
  RenderOptions options_;
};

/// Rows of one file, in order, in bounded memory (a file larger than memory is fine).
class RowReader {
 public:
  virtual ~RowReader() = default;
  virtual std::optional<Row> next() = 0;   // throws DataError with file and line
  virtual void seek(int64_t row) = 0;      // the next row to read
  virtual int64_t count() = 0;             // rows in the file (scans once)
  static std::unique_ptr<RowReader> open(const DatasetConfig& config);
};

/// Resolves names of a run's `dataset:` key (a name, a path, or {name, weight, cap}) against dataset_info.json in
/// `dataset_dir`. Throws UsageError with the nearest known name.
std::vector<DatasetConfig> resolve_datasets(const Json& dataset, const std::filesystem::path& dataset_dir);

/// What a mixture drew from one dataset.
struct MixtureCount {
  std::string name;
  int64_t rows, drawn, skipped, targets;
  double rate;
};

/// An endless weighted mixture: picks a dataset by rate, then its rows in a seeded shuffled order per epoch (block
/// shuffle with bounded memory for large files). Deterministic from the seed; its state is a small cursor.
/// `mixture_rule`: "proportional" | "equal" | "t0" (rate = min(rows, 500000); spec/mov-molora section 10).
class Mixture : public ExampleStream {
 public:
  Mixture(std::vector<DatasetConfig> datasets, std::shared_ptr<const Renderer> renderer, uint64_t seed,
          const std::string& mixture_rule);
  ~Mixture() override;
  std::optional<Example> next() override;
  Json state() const override;
  void set_state(const Json& state) override;
  std::vector<MixtureCount> counts() const;
  /// Rows of one epoch over all datasets, caps applied.
  int64_t epoch_size() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic::data
