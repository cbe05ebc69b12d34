// Datasets: files in the shapes people have them, rendered and tokenised by the one renderer.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/data/example.h"
#include "moesaic/data/prompt_templates.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::data {

class RecordFile;

/// One source of a mixture.
struct DatasetConfig {
  std::string name;                 // a name in dataset_info.json, or a path
  std::filesystem::path path;       // resolved file
  std::string formatting = "auto";  // auto | alpaca | sharegpt | messages | inputs_targets | text | superni
  Json columns = Json::object();    // LLaMA-Factory's column mapping; also `sentence`: a list of numbers
  Json tags = Json::object();       // LLaMA-Factory's names of the keys and roles in a conversation
  double weight = -1;               // relative rate in the mixture; -1 = by the mixture's rule
  int64_t cap = 0;                  // rows at most, spread evenly over the split; 0 = all
  std::string split;                // "train" | "validation" | "" (all)
  double val_size = 0;              // validation rows: a share below 1, or their number; see order.h RowSubset
  uint64_t split_seed = 42;         // which rows these are
  int64_t templates = 1;            // prompt templates of the data set this is one of; only rule t0 reads it
  // What renders raw rows, and which of the templates does; null: the rows are of one of the shapes above.
  std::shared_ptr<const PromptTemplates> prompts;
  size_t prompt = 0;

  /// What a report calls this source: the name, with the template's behind it.
  std::string label() const;
};

/// How rows become examples.
struct RenderOptions {
  int64_t cutoff_len = 1024;           // tokens of a whole example; Renderer says what is cut
  int64_t source_cutoff_len = 0;       // tokens of a prompt that an encoder reads; 0 = no separate limit
  int64_t target_cutoff_len = 0;       // tokens behind the prompt, EOS included; 0 = no separate limit
  std::string template_name = "auto";  // auto: the model's chat templates, if any; none: raw; else see chat_templates
  bool train_on_prompt = false;        // prompts are learnt too
  bool prompt_eos = true;              // prompts that stand apart end in EOS, as the tokenizer has it
  std::string sentence_column;         // column with a list of numbers for router input `sentence`
  std::string on_bad_row = "stop";     // stop | skip: what becomes of a row that can't be read or rendered
};

/// Throws UsageError for values that can't be.
void check_options(const RenderOptions& options);
void check_mixture_rule(const std::string& rule);

/// The chat templates of a run whose key `template` is `name`: the checkpoint's (auto), none, one of templates.h, the
/// checkpoint's one of that name, or a Jinja file. Throws UsageError for anything else.
formats::ChatTemplates chat_templates(const formats::Checkpoint& checkpoint, const std::string& name);

/// A row in one form, whatever the file's shape.
struct Row {
  OrderedJson messages;        // chat shapes: [{role, content}]; null for raw shapes
  std::string prompt, target;  // inputs/targets and text (empty prompt)
  OrderedJson tools;
  std::vector<float> sentence;
  std::string id;
  std::string where;  // file and line, for messages
};

/// Renders and tokenises rows. One object serves training, preview and evaluation.
///
/// With a chat template a row is a conversation: the assistant's turns and their end-of-turn tokens are targets;
/// inputs/targets become one user and one assistant turn. Raw (template `none`, no chat template, or a `text` row) it
/// is  [BOS if the tokenizer adds one] prompt answer EOS,  BOS and EOS once also where the texts spell them, with
/// nothing put between prompt and answer and the two tokenised apart, so that the prompt's ids are those generation
/// sees. A prompt that an encoder reads is a text of its own (Tokenizer::encode_start). The last label is the EOS or
/// end-of-turn token unless cut.
///
/// Cutting. An answer longer than target_cutoff_len loses its end, and so does an encoder's prompt longer than
/// source_cutoff_len, as T5's own pipeline cuts it. An example longer than cutoff_len loses the middle
/// of its prompt (all before the first target), because both ends hold what the model needs: BOS, the system turn and
/// the start of the request, and its end and the assistant's header. The prompt keeps at least half of cutoff_len (or
/// all of it, if shorter); what is still too long is cut from the end of the example.
class Renderer {
 public:
  Renderer(std::shared_ptr<const tokenizer::Tokenizer> tokenizer, std::shared_ptr<const tokenizer::ChatTemplate> chat,
           RenderOptions options);
  /// With the tokenizer and chat template of a checkpoint. Throws DataError when it has no tokenizer.
  static std::shared_ptr<Renderer> open(const formats::Checkpoint& checkpoint, RenderOptions options);
  /// nullopt when there is no answer, or nothing is left to train on after cutting.
  /// Throws DataError with the row's place when it can't be rendered.
  std::optional<Example> render(const Row& row) const;
  /// The prompt of a conversation that a model is asked to answer, tokenised. Without a chat template only a single
  /// user message can be rendered.
  std::vector<int64_t> render_prompt(const OrderedJson& messages, const OrderedJson& tools = nullptr) const;
  /// The prompt of a row: without the assistant's last turn, or without the target. Equals the start of render(row).
  std::vector<int64_t> render_prompt(const Row& row) const;
  /// The template that renders rows with a prompt; nullptr: raw text.
  const tokenizer::ChatTemplate* chat_template() const { return chat_.get(); }
  const tokenizer::Tokenizer& tokenizer() const { return *tokenizer_; }
  const RenderOptions& options() const { return options_; }
  /// Everything that decides what a row becomes, as hashes and settings: {"tokenizer", "template", "cutoff_len", ...}.
  Json identity() const;

 private:
  std::optional<Example> render_row(const Row& row) const;

  std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
  std::shared_ptr<const tokenizer::ChatTemplate> chat_;
  RenderOptions options_;
};

/// Rows of one file's split, in order, in bounded memory (a file larger than memory is fine). A row number counts the
/// rows of the split, capped.
class RowReader {
 public:
  virtual ~RowReader() = default;
  /// The next row; nullopt at the end. Throws DataError with file and line for a damaged row, and goes on behind it.
  virtual std::optional<Row> next() = 0;
  virtual void seek(int64_t row) = 0;  // the next row to read
  virtual int64_t count() = 0;         // rows (scans the file once)
  /// Row numbers at which units begin that are cheap to read in any order, and at the end count().
  virtual std::vector<int64_t> blocks() = 0;
  /// The rows' shape: config.formatting, or what `auto` found.
  virtual const std::string& formatting() const = 0;
  /// `file`: config's, where it is open already.
  static std::unique_ptr<RowReader> open(const DatasetConfig& config, std::shared_ptr<RecordFile> file = nullptr);
};

/// Resolves a run's `dataset:` key against dataset_info.json in `dataset_dir`. An item is a name of that registry, a
/// file or a folder (every data file in it), absolute or relative to `dataset_dir` or the working folder; or an object
/// {name, weight, cap, split, formatting, columns, tags, val_size, templates, prompts}. A list, one item, or names
/// separated by commas. With `prompts` a folder is one data set of raw rows, and each template a source of its own.
/// Throws UsageError with the nearest known name.
std::vector<DatasetConfig> resolve_datasets(const Json& dataset, const std::filesystem::path& dataset_dir);

/// Each data set cut into a train and a validation part that never overlap. `val_size`: of each data set, a share
/// (below 1) or a number of rows; 0 = no validation part.
std::pair<std::vector<DatasetConfig>, std::vector<DatasetConfig>> train_validation(std::vector<DatasetConfig> datasets,
                                                                                   double val_size, uint64_t seed);

/// Every row of the data sets in file order as examples, at most `limit` of each (0 = all): for evaluation. Bad rows
/// are named all at once, in a DataError, or in a warning where the renderer skips them.
std::vector<Example> load_examples(const std::vector<DatasetConfig>& datasets, const Renderer& renderer,
                                   int64_t limit = 0);

/// What a mixture drew from one dataset.
struct MixtureCount {
  std::string name;
  int64_t rows, drawn, skipped, targets;
  double rate;
};

/// An endless weighted mixture: draw t picks a dataset by rate with a hash of (seed, t), then that dataset's next row
/// in the seeded order of its epoch: a permutation of all rows of a text file; of blocks, then of the rows in a block,
/// for Parquet and Arrow. Both are computed, not stored, so the state is one number per dataset and memory does not
/// grow with the files. Rows that leave nothing to train on are skipped and counted. Rates are the datasets' weights
/// when they have them (all or none), otherwise from `mixture_rule`:
///   proportional   rows (after caps)
///   equal          1
///   t0             rows, or 500000 // templates where there are more than 500000 rows (the rule of the T0 mixture,
///                  arXiv 2110.08207)
class Mixture : public ExampleStream {
 public:
  Mixture(std::vector<DatasetConfig> datasets, std::shared_ptr<const Renderer> renderer, uint64_t seed,
          const std::string& mixture_rule);
  ~Mixture() override;
  std::optional<Example> next() override;
  /// The next example of one data set, as next() will draw it when it comes to that.
  Example next_of(size_t dataset);
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
