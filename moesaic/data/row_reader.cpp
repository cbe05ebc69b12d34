#include <algorithm>
#include <cmath>

#include "moesaic/data/dataset.h"
#include "moesaic/data/order.h"
#include "moesaic/data/record_file.h"
#include "moesaic/data/shape.h"
#include "moesaic/data/validate.h"

namespace moesaic::data {
namespace {

class FileRowReader : public RowReader {
 public:
  FileRowReader(const DatasetConfig& config, std::shared_ptr<RecordFile> file)
      : config_(config), file_(file ? std::move(file) : RecordFile::open(config.path)) {
    MOESAIC_CHECK(config.split.empty() || config.split == "train" || config.split == "validation", UsageError,
                  "dataset {}: split is '{}', expected train or validation", config.name, config.split);
    MOESAIC_CHECK(config.val_size >= 0 && std::isfinite(config.val_size), UsageError,
                  "dataset {}: val_size is {}, expected a share below 1 or a number of rows", config.name,
                  config.val_size);
    MOESAIC_CHECK(config.cap >= 0, UsageError, "dataset {}: cap is {}, expected a number of rows", config.name,
                  config.cap);
    MOESAIC_CHECK(file_->has(0), DataError, "{}: no rows", config.path.string());
    shape_.emplace(config, file_->header(), file_->read(0), file_->where(0));
  }

  std::optional<Row> next() override {
    // Whole files are read without a count, so that a look at the first rows of a huge file is cheap.
    bool whole = config_.split.empty() && config_.cap == 0;
    int64_t row = position_;
    if (whole ? !file_->has(row) : row >= count()) return std::nullopt;
    if (!whole) row = subset().at(row);
    ++position_;
    OrderedJson record = file_->read(row);
    std::string where = file_->where(row);
    Row result = shape_->row(record, where);
    result.where = std::move(where);
    return result;
  }

  void seek(int64_t row) override { position_ = row; }
  int64_t count() override { return subset().size(); }
  const std::string& formatting() const override { return shape_->formatting(); }

  std::vector<int64_t> blocks() override {
    // The first row of the split at or behind each border of the file.
    std::vector<int64_t> starts;
    for (int64_t border : file_->blocks()) {
      int64_t low = 0, high = count();
      while (low < high) {
        int64_t middle = (low + high) / 2;
        if (subset().at(middle) < border)
          low = middle + 1;
        else
          high = middle;
      }
      if (starts.empty() || low > starts.back()) starts.push_back(low);
    }
    return starts;
  }

 private:
  const RowSubset& subset() {
    if (subset_) return *subset_;
    int64_t rows = file_->rows();
    int64_t validation = static_cast<int64_t>(
        config_.val_size < 1 ? std::llround(config_.val_size * static_cast<double>(rows)) : config_.val_size);
    MOESAIC_CHECK(config_.split.empty() || validation < rows, DataError,
                  "dataset {}: val_size {} of {} rows leaves none to train on", config_.name, config_.val_size, rows);
    auto split = config_.split.empty()      ? RowSubset::Split::kAll
                 : config_.split == "train" ? RowSubset::Split::kTrain
                                            : RowSubset::Split::kValidation;
    subset_.emplace(rows, validation, split, config_.cap, config_.split_seed);
    return *subset_;
  }

  DatasetConfig config_;
  std::shared_ptr<RecordFile> file_;
  std::optional<Shape> shape_;
  std::optional<RowSubset> subset_;
  int64_t position_ = 0;
};

}  // namespace

std::string DatasetConfig::label() const {
  return prompts ? fmt::format("{}: {}", name, prompts->templates()[prompt].name) : name;
}

std::unique_ptr<RowReader> RowReader::open(const DatasetConfig& config, std::shared_ptr<RecordFile> file) {
  return std::make_unique<FileRowReader>(config, std::move(file));
}

std::vector<Example> load_examples(const std::vector<DatasetConfig>& datasets, const Renderer& renderer,
                                   int64_t limit) {
  constexpr size_t kNamed = 100;
  std::vector<Example> examples;
  std::vector<Validation> judged;
  for (size_t i = 0; i < datasets.size(); ++i) {
    DatasetConfig config = datasets[i];
    if (!renderer.options().sentence_column.empty()) config.columns["sentence"] = renderer.options().sentence_column;
    auto reader = RowReader::open(config);
    Validation& found = judged.emplace_back();
    const int64_t rows = reader->count();
    for (int64_t taken = 0; found.rows < rows && (limit == 0 || taken < limit); ++found.rows) {
      std::optional<Example> example;
      try {
        example = renderer.render(*reader->next());
      } catch (const DataError& error) {
        if (found.problems.size() < kNamed) found.problems.emplace_back(error.what());
        ++found.damaged;
      }
      if (!example) continue;
      example->dataset = static_cast<int64_t>(i);
      examples.push_back(std::move(*example));
      ++taken;
    }
  }
  settle_bad_rows(judged, renderer.options());
  return examples;
}

}  // namespace moesaic::data
