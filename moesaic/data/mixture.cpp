#include <algorithm>
#include <cmath>
#include <map>

#include "moesaic/base/file_memory.h"
#include "moesaic/base/sha256.h"
#include "moesaic/data/dataset.h"
#include "moesaic/data/order.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {
namespace {

constexpr int64_t kT0Cap = 500'000;

/// A hash of all bytes of a dataset's files and of what is read of them.
std::string content_of(const DatasetConfig& config) {
  std::error_code error;
  std::string text = Json({config.formatting, config.columns, config.tags}).dump();
  if (config.prompts) text += config.prompts->source(config.prompt);
  if (std::filesystem::is_directory(config.path, error)) {
    for (const auto& file : data_files(config.path)) text += file_sha256(file);
  } else {
    text += file_sha256(config.path);
  }
  return sha256_hex(text);
}

/// The order of one dataset's rows in one epoch.
class EpochOrder {
 public:
  /// `blocks`: RowReader::blocks(). Whole blocks are permuted by `block_key`, and the rows inside each by `key`.
  EpochOrder(const std::vector<int64_t>& blocks, uint64_t block_key, uint64_t key) : blocks_(blocks), key_(key) {
    int64_t count = static_cast<int64_t>(blocks.size()) - 1;
    Permutation permutation(count, block_key);
    ends_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0, end = 0; i < count; ++i) {
      int64_t block = permutation(i);
      order_.push_back(block);
      ends_.push_back(end += blocks[block + 1] - blocks[block]);
    }
  }

  int64_t row(int64_t position) const {
    size_t i = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), position) - ends_.begin());
    int64_t block = order_[i], size = blocks_[block + 1] - blocks_[block];
    int64_t first = ends_[i] - size;
    return blocks_[block] + Permutation(size, hash_mix(key_, static_cast<uint64_t>(block)))(position - first);
  }

 private:
  std::vector<int64_t> blocks_;
  uint64_t key_;
  std::vector<int64_t> order_, ends_;
};

/// One dataset of the mixture and how far it has been read.
struct Source {
  DatasetConfig config;
  std::unique_ptr<RowReader> reader;
  std::vector<int64_t> blocks;
  int64_t rows = 0;
  double rate = 0;
  uint64_t key = 0;
  uint64_t block_key = 0;       // the same for all templates of a file, which thus read it at about the same place
  mutable std::string content;  // content_of, once it was asked for
  // The cursor, and what was drawn.
  int64_t position = 0;  // rows read since the start, over all epochs
  int64_t drawn = 0, skipped = 0, targets = 0;
  int64_t epoch = -1;  // of `order`
  std::optional<EpochOrder> order;

  const std::string& content_hash() const {
    if (content.empty()) content = content_of(config);
    return content;
  }

  Row next_row() {
    if (position / rows != epoch) {
      epoch = position / rows;
      const auto number = static_cast<uint64_t>(epoch);
      order.emplace(blocks, hash_mix(block_key, number), hash_mix(key, number));
    }
    reader->seek(order->row(position % rows));
    ++position;
    return *reader->next();
  }
};

}  // namespace

struct Mixture::Impl {
  std::vector<Source> sources;
  std::shared_ptr<const Renderer> renderer;
  uint64_t seed = 0;
  int64_t draws = 0;
  std::vector<double> cumulative;  // of the rates

  /// The data set of the next draw.
  size_t pick() {
    double point = hash_unit(hash_mix(seed, static_cast<uint64_t>(draws++))) * cumulative.back();
    size_t i = static_cast<size_t>(std::upper_bound(cumulative.begin(), cumulative.end(), point) - cumulative.begin());
    return std::min(i, sources.size() - 1);
  }
};

void check_mixture_rule(const std::string& rule) {
  MOESAIC_CHECK(rule == "proportional" || rule == "equal" || rule == "t0", UsageError,
                "mixture_rule is '{}', expected proportional, equal or t0", rule);
}

Mixture::Mixture(std::vector<DatasetConfig> datasets, std::shared_ptr<const Renderer> renderer, uint64_t seed,
                 const std::string& mixture_rule)
    : impl_(std::make_unique<Impl>()) {
  check_mixture_rule(mixture_rule);
  MOESAIC_CHECK(!datasets.empty(), UsageError, "a mixture of no data sets");
  const size_t weighted = static_cast<size_t>(
      std::count_if(datasets.begin(), datasets.end(), [](const DatasetConfig& config) { return config.weight >= 0; }));
  MOESAIC_CHECK(weighted == 0 || weighted == datasets.size(), UsageError,
                "{} of {} data sets have a weight; give all of them one, or none", weighted, datasets.size());
  impl_->renderer = std::move(renderer);
  impl_->seed = hash_mix(seed, 0x6d697874);
  double total = 0;
  struct Opened {
    std::shared_ptr<RecordFile> file;
    uint64_t key;
  };
  std::map<std::filesystem::path, Opened> opened;  // raw rows that several templates read
  for (size_t i = 0; i < datasets.size(); ++i) {
    Source source;
    source.config = std::move(datasets[i]);
    if (const std::string& column = impl_->renderer->options().sentence_column; !column.empty()) {
      source.config.columns["sentence"] = column;
    }
    source.key = source.block_key = hash_mix(impl_->seed, i + 1);
    if (source.config.prompts) {
      auto known = opened.find(source.config.path);
      if (known == opened.end()) {
        Opened made{RecordFile::open(source.config.path), source.key};
        known = opened.emplace(source.config.path, std::move(made)).first;
      }
      source.reader = RowReader::open(source.config, known->second.file);
      source.block_key = known->second.key;
    } else {
      source.reader = RowReader::open(source.config);
    }
    source.rows = source.reader->count();
    MOESAIC_CHECK(source.rows > 0, DataError, "dataset {}: no rows in its {} split", source.config.name,
                  source.config.split);
    source.blocks = source.reader->blocks();
    double rows = static_cast<double>(source.rows);
    if (weighted > 0)
      source.rate = source.config.weight;
    else if (mixture_rule == "equal")
      source.rate = 1;
    else if (mixture_rule == "t0" && source.rows > kT0Cap)
      source.rate = static_cast<double>(kT0Cap / source.config.templates);
    else
      source.rate = rows;
    total += source.rate;
    impl_->cumulative.push_back(total);
    impl_->sources.push_back(std::move(source));
  }
  MOESAIC_CHECK(total > 0, UsageError, "the weights of all data sets are 0");
}

Mixture::~Mixture() = default;

std::optional<Example> Mixture::next() { return next_of(impl_->pick()); }

Example Mixture::next_of(size_t dataset) {
  Source& source = impl_->sources.at(dataset);
  // Twice the rows hold a whole epoch, wherever in one the reading stands.
  for (int64_t tries = 0; tries < 2 * source.rows; ++tries) {
    std::optional<Example> example;
    try {
      example = impl_->renderer->render(source.next_row());
    } catch (const DataError&) {
      if (impl_->renderer->options().on_bad_row != "skip") throw;
    }
    if (!example) {
      ++source.skipped;
      continue;
    }
    example->dataset = static_cast<int64_t>(dataset);
    ++source.drawn;
    source.targets += example->targets();
    return std::move(*example);
  }
  throw DataError(
      fmt::format("dataset {}: none of {} rows leaves anything to train on; is cutoff_len ({}) too small, or are the "
                  "answers empty?",
                  source.config.label(), source.rows, impl_->renderer->options().cutoff_len));
}

Json Mixture::state() const {
  Json datasets = Json::array();
  for (const Source& source : impl_->sources) {
    datasets.push_back({{"name", source.config.label()},
                        {"rows", source.rows},
                        {"content", source.content_hash()},
                        {"weight", source.rate / impl_->cumulative.back()},
                        {"position", source.position},
                        {"drawn", source.drawn},
                        {"skipped", source.skipped},
                        {"targets", source.targets}});
  }
  return {{"seed", impl_->seed},
          {"draws", impl_->draws},
          {"datasets", datasets},
          {"rendering", impl_->renderer->identity()}};
}

void Mixture::set_state(const Json& state) {
  const std::string where = "state of the data mixture";
  const Json datasets = get<Json>(state, "datasets", where);
  constexpr const char* kHint =
      "hint: a run with other data is a new one. Begin it where this one stands, in an output_dir of its own: with "
      "adapter_name_or_path=CHECKPOINT, or model_name_or_path=CHECKPOINT for full and calm (docs/training.md)";
  MOESAIC_CHECK(get<uint64_t>(state, "seed", where) == impl_->seed, DataError,
                "{}: got another seed than it was saved with, which gives another order\n{}", where, kHint);
  MOESAIC_CHECK(datasets.size() == impl_->sources.size(), DataError,
                "{}: got {} data sets, expected the {} it was saved with\n{}", where, impl_->sources.size(),
                datasets.size(), kHint);
  for (size_t i = 0; i < datasets.size(); ++i) {
    const Source& source = impl_->sources[i];
    auto name = get<std::string>(datasets[i], "name", where);
    auto rows = get<int64_t>(datasets[i], "rows", where);
    MOESAIC_CHECK(name == source.config.label() && rows == source.rows, DataError,
                  "{}: data set {} was {} with {} rows, now {} with {} rows\n{}", where, i, name, rows,
                  source.config.label(), source.rows, kHint);
    MOESAIC_CHECK(get<int64_t>(datasets[i], "position", where) >= 0, DataError, "{}: a negative position", where);
  }
  // What is not the place in the order may differ, and is said.
  const Json now = this->state();
  std::vector<std::string> differences;
  auto compare = [&](const std::string& of, const Json& then, const Json& has, const std::string& key) {
    if (!then.contains(key) || then[key] == has[key]) return;
    differences.push_back(fmt::format("{}{} {}, now {}", of, key, then[key].dump(), has[key].dump()));
  };
  for (const auto& [key, value] : now["rendering"].items()) {
    compare("", get_or<Json>(state, "rendering", Json::object(), where), now["rendering"], key);
  }
  for (size_t i = 0; i < datasets.size(); ++i) {
    for (const char* key : {"content", "weight"}) {
      compare(impl_->sources[i].config.label() + ": ", datasets[i], now["datasets"][i], key);
    }
  }
  if (!differences.empty()) {
    spdlog::warn("{}: the data is not what it was: {}: it goes on with what is there now", where,
                 fmt::join(differences, "; "));
  }
  impl_->draws = get<int64_t>(state, "draws", where);
  for (size_t i = 0; i < datasets.size(); ++i) {
    Source& source = impl_->sources[i];
    source.position = get<int64_t>(datasets[i], "position", where);
    source.drawn = get<int64_t>(datasets[i], "drawn", where);
    source.skipped = get<int64_t>(datasets[i], "skipped", where);
    source.targets = get<int64_t>(datasets[i], "targets", where);
  }
}

std::vector<MixtureCount> Mixture::counts() const {
  std::vector<MixtureCount> counts;
  for (const Source& source : impl_->sources) {
    counts.push_back({source.config.label(), source.rows, source.drawn, source.skipped, source.targets,
                      source.rate / impl_->cumulative.back()});
  }
  return counts;
}

int64_t Mixture::epoch_size() const {
  int64_t size = 0;
  for (const Source& source : impl_->sources) size += source.rows;
  return size;
}

}  // namespace moesaic::data
