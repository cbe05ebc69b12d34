#include "moesaic/run/run.h"

#include "moesaic/base/check.h"
#include "moesaic/base/machine.h"
#include "moesaic/base/progress.h"
#include "moesaic/base/seed.h"
#include "moesaic/base/sha256.h"
#include "moesaic/base/version.h"
#include "moesaic/base/yaml.h"
#include "moesaic/data/templates.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/generate/generate.h"
#include "moesaic/run/open.h"
#include "moesaic/train/checkpoint.h"
#include "moesaic/train/memory.h"

namespace moesaic::run {

namespace fs = std::filesystem;

namespace {

constexpr size_t kNamedRows = 100;  // bad ones, of each data set
constexpr const char* kRunFileHead = "# Every key of this run.\n";

/// Whether `dir` is the output folder of a run, by the run.yaml it writes first.
bool left_by_a_run(const fs::path& dir) {
  return fs::is_regular_file(dir / "run.yaml") && read_file(dir / "run.yaml").starts_with(kRunFileHead);
}

/// The result of an earlier run that this one replaces: it may be of another kind, whose files would stay.
void remove_result(const fs::path& dir) {
  static const std::set<std::string> kNames{
      "adapter_config.json", "adapter_model.safetensors", "calm_config.json",       "calm_model.safetensors",
      "config.json",         "model.safetensors",         "generation_config.json", "model.safetensors.index.json"};
  std::vector<fs::path> results;
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    const bool shard = name.starts_with("model-") && name.ends_with(".safetensors");
    if (entry.is_regular_file() && (shard || kNames.contains(name))) results.push_back(entry.path());
  }
  for (const fs::path& result : results) fs::remove(result);
}

/// Throws UsageError where the run would destroy what is not its own: an input, a model, another run's result.
void check_output(const RunConfig& config) {
  const train::TrainConfig& train = config.train;
  const fs::path &dir = train.output_dir, &resumed = train.resume_from_checkpoint;
  check_writable(dir, "output_dir");
  if (!config.state_cache_dir.empty()) check_writable(config.state_cache_dir, "state_cache_dir");
  std::vector<fs::path> inputs{config.model_name_or_path, config.adapter_name_or_path, config.tokenizer};
  inputs.insert(inputs.end(), config.adapters.begin(), config.adapters.end());
  if (config.init == "random" && inputs[0].filename() == "config.json") inputs[0] = inputs[0].parent_path();
  check_not_an_input(dir, inputs);
  const auto checkpoints = train::list_checkpoints(dir);
  if (train.overwrite_output_dir) {
    for (const auto& checkpoint : checkpoints) check_not_an_input(checkpoint.path, inputs);
  }
  const std::string found = found_work(dir);
  if (found.empty()) return;
  MOESAIC_CHECK(left_by_a_run(dir), UsageError,
                "output_dir {}: got a folder that holds {}, of no run of moesaic, expected a new one: nothing is "
                "overwritten",
                dir.string(), found);
  if (train.overwrite_output_dir) return;
  if (resumed == "auto" && !checkpoints.empty()) return;
  if (resumed != "auto" && resumed != "none") {
    std::error_code error;
    const fs::path named = resumed.has_filename() ? resumed : resumed.parent_path();
    if (fs::equivalent(dir, named.has_parent_path() ? named.parent_path() : fs::path("."), error)) return;
  }
  const std::vector<const char*> kResults{"adapter_config.json", "calm_config.json", "config.json"};
  const auto result =
      std::find_if(kResults.begin(), kResults.end(), [&](const char* name) { return fs::exists(dir / name); });
  MOESAIC_CHECK(checkpoints.empty() && result == kResults.end(), UsageError,
                "output_dir {}: got a folder with {} of an earlier run, expected none\nhint: go on with --resume auto "
                "where it left checkpoints, start anew with overwrite_output_dir=true, or choose another output_dir",
                dir.string(), checkpoints.empty() ? *result : checkpoints.back().path.filename().string());
}

}  // namespace

Run::Run(RunConfig config, bool dry, std::shared_ptr<ranks::Group> group)
    : config_(std::move(config)),
      dry_(dry),
      group_(std::move(group)),
      device_(parse_device(config_.device)),
      format_(number_format(config_.dtype, device_)) {
  train::check_sizes(config_.train);
  if (!dry) {
    if (group_->first()) {
      lock_ = std::make_unique<FolderLock>(config_.train.output_dir);
      check_output(config_);
    }
    train::avoid_heap_holes(format_.dtype, device_);
  }
  train::settle_micro_batches(config_.train, *group_);
  if (config_.train.micro_batches() != config_.train.gradient_accumulation_steps) {
    config_.resolved["micro_batches_per_step"] = config_.train.micro_batches();
  }
  config_.resolved["bf16"] = format_.dtype == torch::kBFloat16;
  auto opened = [this](const formats::Checkpoint& checkpoint) {
    open_data(checkpoint);
    if (dry_ || !group_->first()) return;
    judgement_.verdict = std::async(std::launch::async, [this] { return judge_rows(kNamedRows); });
  };
  prepared_ = subject_of(config_.finetuning_type).open(config_, {device_, format_.dtype, dry, opened});
  check_sentences();
  train::check_run(config_.train, *prepared_.model, *prepared_.learner);
  if (!config_.eval_tasks.empty()) tasks_ = eval::load_tasks(config_.eval_tasks, {.limit = config_.eval_limit});
  for (const eval::Task& task : tasks_) eval::check_metrics(task, {});
  train::check_config(config_.train, mixture_->epoch_size());
  std::vector<std::string> measured = train::loss_names(eval_sets_);
  for (const eval::Task& task : tasks_) {
    for (const std::string& metric : eval::metric_names(task, {})) {
      measured.push_back(fmt::format("eval/{}/{}", task.name, metric));
    }
  }
  train::check_metric(config_.train, measured);
  if (!dry) compare_ranks();
}

/// Throws UsageError naming the ranks that would train something else than rank 0, and by what.
void Run::compare_ranks() const {
  if (group_->size() == 1) return;
  OrderedJson facts = config_.resolved;
  facts["version of moesaic"] = kVersion;
  facts["number format"] = dtype_name(format_.dtype);
  facts["weights of the model"] = prepared_.checkpoint->fingerprint();
  facts["rows of the data"] = sha256_hex(mixture_->state().dump());
  facts["data"] = OrderedJson::array();
  for (const auto& count : mixture_->counts()) facts["data"].push_back({count.name, count.rows, count.rate});
  for (const train::EvalSet& set : eval_sets_) facts["data"].push_back({set.name, set.examples.size()});
  const std::vector<std::string> all = group_->gather(facts.dump());
  std::vector<std::string> differ;
  const OrderedJson first = OrderedJson::parse(all[0]);
  for (size_t rank = 1; rank < all.size(); ++rank) {
    const OrderedJson other = OrderedJson::parse(all[rank]);
    for (const auto& [key, value] : first.items()) {
      const OrderedJson got = other.value(key, OrderedJson());
      if (got != value)
        differ.push_back(fmt::format("rank {}: {}: got {}, expected {}", rank, key, got.dump(), value.dump()));
    }
  }
  MOESAIC_CHECK(differ.empty(), UsageError, "the ranks would not train the same run as rank 0:\n  {}",
                fmt::join(differ, "\n  "));
}

void Run::open_data(const formats::Checkpoint& checkpoint) {
  const std::string begun = config_.adapters.empty() ? config_.adapter_name_or_path : config_.adapters.front();
  if (config_.render.template_name == "auto" && !begun.empty()) {
    formats::TokenizerFiles files;  // with what the adapter that the run goes on with brings of its own
    files.chat_templates = checkpoint.chat_templates();
    formats::adapt(files, begun);
    const std::shared_ptr<const tokenizer::Tokenizer> tokenizer = tokenizer::Tokenizer::open(checkpoint);
    std::shared_ptr<tokenizer::ChatTemplate> chat;
    if (!files.chat_templates.empty()) {
      chat = std::make_shared<tokenizer::ChatTemplate>(std::move(files.chat_templates), *tokenizer);
    }
    renderer_ = std::make_shared<data::Renderer>(tokenizer, chat, config_.render);
  } else {
    renderer_ = data::Renderer::open(checkpoint, config_.render);
  }
  auto [training, validation] = data::train_validation(resolve(config_.dataset), config_.val_size, config_.train.seed);
  if (config_.max_samples > 0) {  // the rows that are held out are of these
    for (size_t i = 0; i < validation.size(); ++i) {
      int64_t& cap = training[i].cap;
      const double share = config_.val_size < 1 ? config_.val_size * static_cast<double>(cap) : config_.val_size;
      validation[i].cap = std::clamp<int64_t>(std::llround(share), 1, std::max<int64_t>(1, cap - 1));
      cap = std::max<int64_t>(1, cap - validation[i].cap);
    }
  }
  if (!config_.eval_dataset.is_null()) {
    for (auto& each : resolve(config_.eval_dataset)) validation.push_back(each);
  }
  training_ = std::move(training);
  mixture_ = std::make_unique<data::Mixture>(training_, renderer_, derive_seed(config_.train.seed, "mixture"),
                                             config_.mixture_rule);
  settle_epochs();
  warn_of_glued_text();
  for (const data::DatasetConfig& config : validation) {
    auto set = std::find_if(eval_sets_.begin(), eval_sets_.end(),
                            [&](const train::EvalSet& known) { return known.name == config.name; });
    if (set == eval_sets_.end()) set = eval_sets_.insert(set, train::EvalSet{config.name, {}});
    std::vector<data::Example> examples = data::load_examples({config}, *renderer_);
    std::move(examples.begin(), examples.end(), std::back_inserter(set->examples));
  }
  MOESAIC_CHECK((config_.train.eval_steps == 0 && !config_.train.eval_on_start) || !eval_sets_.empty(), UsageError,
                "{}: got no evaluation data; give val_size or eval_dataset",
                config_.train.eval_steps > 0 ? "eval_steps" : "eval_on_start");
  for (const train::EvalSet& set : eval_sets_) {
    MOESAIC_CHECK(std::any_of(set.examples.begin(), set.examples.end(),
                              [](const data::Example& example) { return example.targets() > 0; }),
                  DataError, "{}: got {} rows for evaluation, expected some with an answer to score", set.name,
                  set.examples.size());
  }
}

std::vector<data::DatasetConfig> Run::resolve(const Json& dataset) const {
  auto configs = data::resolve_datasets(dataset, config_.dataset_dir);
  const adapters::RouterConfig& router = config_.adapter.router;
  const bool reads_column = config_.adapter.num_experts > 1 && router.input == "sentence" &&
                            router.sentence_source == "column" && config_.render.sentence_column.empty();
  for (data::DatasetConfig& config : configs) {
    if (config_.max_samples > 0) {
      config.cap = config.cap > 0 ? std::min(config.cap, config_.max_samples) : config_.max_samples;
    }
    if (config_.pretraining) {
      MOESAIC_CHECK(!config.prompts, UsageError,
                    "stage: got pt and data set {} with prompts, expected sft: prompts and answers are no plain texts",
                    config.name);
      config.formatting = "text";
      std::erase_if(config.columns.get_ref<Json::object_t&>(),
                    [](const auto& column) { return column.first != "prompt" && column.first != "sentence"; });
    }
    MOESAIC_CHECK(!reads_column || config.columns.contains("sentence"), UsageError,
                  "router.sentence_source: got column, but no column of data set {} has the sentences' numbers\nhint: "
                  "name it with sentence_column, or take sentence_source: hidden",
                  config.name);
  }
  return configs;
}

/// Of models without a chat template, unless it was said that this is meant.
void Run::warn_of_glued_text() const {
  if (config_.render.template_name != "auto" || renderer_->chat_template() != nullptr ||
      renderer_->tokenizer().prompts_apart()) {
    return;
  }
  const bool only_texts = std::all_of(training_.begin(), training_.end(), [](const data::DatasetConfig& config) {
    return data::RowReader::open(config)->formatting() == "text";
  });
  if (only_texts) return;
  spdlog::warn(
      "template: {} has no chat template: nothing will stand between a prompt and its answer\nhint: template=NAME with "
      "one of {}, or template=none if this is meant",
      config_.model_name_or_path, fmt::join(data::template_names(), ", "));
}

/// The width of the vectors that routers read from a column of the data.
void Run::check_sentences() const {
  const nn::Needs needs = prepared_.model->needs();
  if (needs.sentence != nn::Needs::Sentence::kColumn) return;
  for (data::DatasetConfig config : training_) {
    if (!config_.render.sentence_column.empty()) config.columns["sentence"] = config_.render.sentence_column;
    std::optional<data::Row> row;
    try {
      row = data::RowReader::open(config)->next();
    } catch (const DataError&) {  // check_rows names it, with the other bad rows
    }
    MOESAIC_CHECK(!row || std::ssize(row->sentence) == needs.sentence_width, UsageError,
                  "router.sentence_dim: got {}, expected {}: the numbers in column {} of data set {}",
                  needs.sentence_width, row->sentence.size(), config.columns["sentence"].dump(), config.name);
  }
}

/// Steps between evaluations and checkpoints that come once an epoch.
void Run::settle_epochs() {
  train::TrainConfig& train = config_.train;
  const int64_t examples = train.per_device_train_batch_size * train.micro_batches();
  const int64_t epoch = std::max<int64_t>(1, (mixture_->epoch_size() + examples - 1) / examples);
  if (config_.eval_each_epoch) train.eval_steps = epoch;
  if (config_.save_each_epoch) train.save_steps = epoch;
}

std::vector<int64_t> Run::answer_ends() const {
  return eos_ids(*prepared_.model, prepared_.checkpoint->generation_config(), &renderer_->tokenizer(),
                 renderer_->chat_template());
}

/// {"<task>/<metric>", value} for every task: asked as training renders its data.
train::Scores Run::task_scores() {
  const eval::EvalModel model{*prepared_.model, renderer_->tokenizer(), renderer_->chat_template()};
  eval::EvalOptions options;
  eval::ask_as_trained(model, options);
  options.generation.max_new_tokens = config_.eval_max_gen_toks;
  options.generation.eos_ids = answer_ends();
  options.group = group_;
  train::Scores scores;
  std::vector<moe::RoutingStats> routing;
  for (const eval::Task& task : tasks_) {
    eval::TaskResult result = eval::evaluate(model, task, options);
    for (const auto& metrics : {result.metrics, result.corpus_metrics}) {
      for (const auto& [metric, mean] : metrics) scores.emplace_back(task.name + "/" + metric, mean.value);
    }
    routing.push_back(std::move(result.routing));
  }
  const double information = moe::task_information(routing);
  if (std::isfinite(information)) scores.emplace_back(kTaskInformation, information);
  return scores;
}

std::vector<data::Validation> Run::judge_rows(size_t max_problems) const {
  constexpr int64_t kShown = 10000;  // rows: fewer are judged at once
  const int64_t total = mixture_->epoch_size();
  std::optional<Progress> progress;
  if (total >= kShown) progress.emplace("rows", total);
  int64_t judged = 0;
  std::vector<data::Validation> results;
  for (const data::DatasetConfig& config : training_) {
    results.push_back(data::validate(
        config, {.max_problems = max_problems, .renderer = renderer_.get(), .progress = [&](int64_t rows) {
                   if (progress) progress->update(judged += rows);
                   if (judgement_.given_up) throw DataError("the run ended before its rows were judged");
                 }}));
  }
  return results;
}

void Run::check_rows() {
  data::settle_bad_rows(judgement_.verdict.valid() ? judgement_.verdict.get() : judge_rows(kNamedRows), config_.render);
}

void Run::check_start() {
  check_output(config_);
  if (fs::exists(config_.train.output_dir / "run.lock")) const FolderLock free(config_.train.output_dir);
  train::check_start(*prepared_.model, *prepared_.learner, *mixture_, config_.train, mixture_->epoch_size());
}

int64_t Run::trainable() const {
  int64_t count = 0;
  for (const auto& tensor : train::optimized_tensors(*prepared_.learner, config_.train)) count += tensor.tensor.numel();
  return count;
}

Plan Run::plan() {
  Plan plan;
  plan.add("model", fmt::format("{} ({}, {} parameters, {} on {}: {})", config_.model_name_or_path,
                                prepared_.model->facts().model_type,
                                format_count(static_cast<double>(prepared_.base_parameters)), dtype_name(format_.dtype),
                                device_.str(), format_.reason));
  for (const auto& [label, text] : prepared_.plan.lines) plan.add(label, text);
  const int64_t numbers = trainable();
  plan.add("trainable",
           fmt::format("{} ({:.4f} % of {})", numbers,
                       100.0 * static_cast<double>(numbers) / static_cast<double>(prepared_.base_parameters),
                       prepared_.base_parameters));
  size_t held_out = 0;
  for (const train::EvalSet& set : eval_sets_) held_out += set.examples.size();
  const bool unused = held_out > 0 && config_.train.eval_steps == 0;
  plan.add("data", fmt::format("{} examples an epoch, {} for evaluation{}", mixture_->epoch_size(), held_out,
                               unused ? " (never: eval_steps is 0)" : ""));
  for (const auto& count : mixture_->counts()) {
    plan.add("", fmt::format("{}: {} rows, rate {:.3f}", count.name, count.rows, count.rate));
  }
  return plan;
}

/// The largest of the run's first micro-batches stands for all.
Plan Run::needs_plan(const train::Accelerator* on) {
  constexpr int64_t kSampled = 32;
  constexpr double kMib = 1 << 20;
  const train::TrainConfig& config = config_.train;
  int64_t most_tokens = 0, most_targets = 0;
  train::MicroBatchShape mean{0, 0, 0, 0};
  for (int64_t i = 0; i < kSampled; ++i) {
    int64_t tokens = 0, targets = 0;
    for (int64_t n = 0; config.max_batch_tokens > 0 || n < config.per_device_train_batch_size; ++n) {
      const auto example = mixture_->next();
      if (!example) break;
      const auto length = static_cast<int64_t>(example->ids.size());
      if (config.max_batch_tokens > 0 && n > 0 && tokens + length > config.max_batch_tokens) break;
      tokens += length;
      targets += example->targets();
      const int64_t prompt = example->prompt_ends.empty() ? 0 : example->prompt_ends.front();
      mean.examples += 1.0 / kSampled;
      mean.prompt_tokens += static_cast<double>(prompt) / kSampled;
      mean.answer_tokens += static_cast<double>(length - prompt) / kSampled;
      mean.targets += static_cast<double>(example->targets()) / kSampled;
    }
    most_tokens = std::max(most_tokens, tokens);
    most_targets = std::max(most_targets, targets);
  }
  train::MemoryEstimate estimate =
      train::estimate_memory(*prepared_.model, *prepared_.learner, config, most_tokens, most_targets,
                             on != nullptr ? torch::Device(torch::kCUDA) : device_);
  if (prepared_.more_memory) {
    const auto more = prepared_.more_memory(most_tokens);
    estimate.parts.insert(estimate.parts.end(), more.begin(), more.end());
  }
  Plan plan;
  plan.add("memory",
           fmt::format("{:.0f} MiB for micro-batches of up to {} tokens ({} targets), the largest of {} drawn",
                       static_cast<double>(estimate.total()) / kMib, most_tokens, most_targets, kSampled));
  for (const auto& [name, bytes] : estimate.parts) {
    plan.add("", fmt::format("{:<18}{:>8.1f} MiB", name, static_cast<double>(bytes) / kMib));
  }
  if (on == nullptr) return plan;
  const train::Cost cost =
      train::micro_batch_cost(*prepared_.model, *prepared_.learner, mean, config.gradient_checkpointing);
  const double parts = static_cast<double>(config.micro_batches()), kTera = 1e12, kGiga = 1e9;
  const double seconds = parts * cost.seconds(*on, format_.dtype);
  const int64_t steps = train::steps_of(config, mixture_->epoch_size());
  plan.add("time",
           fmt::format("{} steps of {:.0f} tokens in {:.0f} examples, {:.3g} TFLOP each: {:.2g} s a step and {} "
                       "in all on one {}",
                       steps, parts * (mean.prompt_tokens + mean.answer_tokens), parts * mean.examples,
                       parts * cost.operations / kTera, seconds, format_duration(seconds * static_cast<double>(steps)),
                       on->name));
  plan.add("", fmt::format("assumed: {:.0f} % of its {:.3g} TFLOP/s in {}, or {:.0f} % of its {:.0f} GB/s for the "
                           "weights, whatever takes longer; evaluation not counted",
                           100 * train::kUtilisation,
                           (format_.dtype == torch::kBFloat16 ? on->bfloat16 : on->float32) / kTera,
                           dtype_name(format_.dtype), 100 * train::kBandwidthShare, on->bandwidth / kGiga));
  plan.add("", fmt::format("memory: {:.1f} of its {:.0f} GB{}", static_cast<double>(estimate.total()) / kGiga,
                           on->memory / kGiga,
                           static_cast<double>(estimate.total()) > on->memory ? ": it does not fit" : ""));
  return plan;
}

void Run::write_inputs() const {
  const fs::path& dir = config_.train.output_dir;
  fs::create_directories(dir);
  if (config_.train.overwrite_output_dir) remove_result(dir);
  write_file_atomically(dir / "run.yaml", kRunFileHead + to_yaml(config_.resolved));
  // What the run was rendered with, so that whoever uses it asks in the same words.
  formats::TokenizerFiles files;
  if (renderer_->chat_template()) files.chat_templates = renderer_->chat_template()->sources();
  // All weights are a model of their own; anything else finds its base's template again.
  if (!renderer_->chat_template() && !prepared_.checkpoint->chat_templates().empty() &&
      config_.finetuning_type != "full") {
    files.chat_templates = formats::kNoTemplate;
  }
  if (prepared_.keeps_tokenizer) {
    files.json = renderer_->tokenizer().json();
    files.config = renderer_->tokenizer().config();
  }
  formats::write_tokenizer_files(dir, files);
}

train::TrainResult Run::train(const train::TrainHooks& hooks, const std::string& command) {
  MOESAIC_CHECK(!dry_, UsageError, "run: it was opened dry, expected one opened for training");
  if (group_->first()) {
    check_rows();
    write_inputs();
  }
  const train::TrainConfig& config = config_.train;
  const int64_t epoch = mixture_->epoch_size();
  if (prepared_.begin) {
    const bool longer =
        epoch > 0 && (config.max_batch_tokens > 0 || config.max_steps < 0 ||
                      config.max_steps * config.per_device_train_batch_size * config.micro_batches() > epoch);
    prepared_.begin(longer || (config.eval_steps > 0 && !eval_sets_.empty()));
  }
  train::TrainHooks own = hooks;
  own.group = group_;
  if (!tasks_.empty()) own.evaluate_tasks = [this] { return task_scores(); };
  if (!group_->first()) {
    const train::TrainResult result =
        train::train(*prepared_.model, *prepared_.learner, *mixture_, eval_sets_, config, epoch, own);
    if (prepared_.end) prepared_.end();
    return result;
  }
  Report report(config.output_dir, report_facts(command), config.resume_from_checkpoint != "none");
  report.write();
  open_samples(report);
  own.on_log = [&](const train::StepLog& log) {
    report["max_steps"] = log.max_steps;
    if (hooks.on_log) hooks.on_log(log);
  };
  own.on_row = [&](const Json& row) {
    report["data"] = report_counts();
    report.add(row);
    if (hooks.on_row) hooks.on_row(row);
  };
  train::TrainResult result{};
  try {
    result = train::train(*prepared_.model, *prepared_.learner, *mixture_, eval_sets_, config, epoch, own);
  } catch (const std::exception& error) {
    report["status"] = "failed";
    report["message"] = error.what();
    try {
      report.write();
    } catch (const std::exception&) {  // the disk may be what failed; the first error is the one to be told
    }
    throw;
  }
  if (prepared_.end) prepared_.end();
  if (!result.interrupted) write_card(result);
  close_report(result, report);
  lock_.reset();
  return result;
}

OrderedJson Run::report_counts() const {
  OrderedJson counts = OrderedJson::array();
  for (const auto& count : mixture_->counts()) {
    counts.push_back({{"name", count.name},
                      {"rows", count.rows},
                      {"rate", count.rate},
                      {"drawn", count.drawn},
                      {"skipped", count.skipped},
                      {"targets", count.targets}});
  }
  return counts;
}

OrderedJson Run::report_facts(const std::string& command) const {
  const Machine machine = this_machine();
  return {{"moesaic", kVersion},
          {"libtorch", TORCH_VERSION},
          {"command", command},
          {"machine",
           {{"cpu", machine.cpu},
            {"cores", machine.cores},
            {"memory_bytes", machine.memory_bytes},
            {"system", machine.system}}},
          {"threads", at::get_num_threads()},
          {"ranks", group_->size()},
          {"device", device_.str()},
          {"dtype", dtype_name(format_.dtype)},
          {"model", config_.model_name_or_path},
          {"finetuning_type", config_.finetuning_type},
          {"trainable", trainable()},
          {"base_parameters", prepared_.base_parameters},
          {"settings", config_.resolved},
          {"steps", 0},
          {"max_steps", config_.train.max_steps},
          {"tokens", 0},
          {"weights_of", nullptr},
          {"best", nullptr},
          {"data", report_counts()}};
}

/// Greedy answers of the model to the samples' prompts.
std::vector<std::string> Run::sample_answers() {
  std::vector<generate::Prompt> prompts;
  for (const data::Example& sample : samples_) {
    prompts.push_back({{sample.ids.begin(), sample.ids.begin() + sample.prompt_ends[0]}, sample.sentence});
  }
  generate::SamplingOptions options{.max_new_tokens = 48};
  options.eos_ids = answer_ends();
  std::vector<std::string> answers;
  for (const auto& answer : generate::generate(*prepared_.model, renderer_->tokenizer(), prompts, options)) {
    answers.push_back(answer.text);
  }
  return answers;
}

/// Chooses a few rows with a prompt, held-out ones where there are any, and asks the model as it is.
void Run::open_samples(Report& report) {
  constexpr size_t kSamples = 4;
  std::vector<std::pair<std::string, data::Example>> chosen;
  auto take = [&](const std::string& name, const data::Example& example) {
    const bool asked = !example.prompt_ends.empty() && example.prompt_ends[0] > 0;
    if (asked && chosen.size() < kSamples) chosen.emplace_back(name, example);
  };
  for (size_t row = 0; row < kSamples; ++row) {
    for (const train::EvalSet& set : eval_sets_) {
      if (row < set.examples.size()) take(set.name, set.examples[row]);
    }
  }
  const bool held_out = !chosen.empty();
  if (!held_out) {
    const Json begin = mixture_->state();
    for (size_t row = 0; row < kSamples; ++row) {
      if (const auto example = mixture_->next()) take(training_[example->dataset].label(), *example);
    }
    mixture_->set_state(begin);
  }
  for (auto& [name, example] : chosen) samples_.push_back(std::move(example));
  if (samples_.empty() || report.has_samples()) return;
  const std::vector<std::string> answers = sample_answers();
  report["samples_from"] = held_out ? "evaluation" : "training";
  for (size_t i = 0; i < samples_.size(); ++i) {
    const std::vector<int64_t>& ids = samples_[i].ids;
    const std::vector<uint8_t>& mask = samples_[i].mask;
    const int64_t end = samples_[i].prompt_ends[0];
    const int64_t behind = std::find(mask.begin() + end, mask.end(), 0) - mask.begin();
    const tokenizer::Tokenizer& tokenizer = renderer_->tokenizer();
    report["samples"].push_back({{"data_set", chosen[i].first},
                                 {"prompt", tokenizer.decode({ids.begin(), ids.begin() + end}, false)},
                                 {"reference", tokenizer.decode({ids.begin() + end, ids.begin() + behind}, true)},
                                 {"before", answers[i]},
                                 {"after", nullptr}});
  }
}

void Run::close_report(const train::TrainResult& result, Report& report) {
  report["status"] = result.interrupted ? "interrupted" : result.stopped_early ? "stopped early" : "finished";
  report["message"] = result.stopping_reason();
  report["steps"] = result.steps;
  report["tokens"] = result.tokens;
  report["data"] = report_counts();
  report["peak_memory_bytes"] = peak_resident_bytes();
  if (result.best) {
    report["best"] = {{"metric", result.best->metric}, {"value", result.best->value}, {"step", result.best->step}};
  }
  if (!result.interrupted) {
    report["weights_of"] = result.weights_of;
    uintmax_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(config_.train.output_dir)) {
      if (entry.is_regular_file() && entry.path().extension() == ".safetensors") bytes += entry.file_size();
    }
    report["result_bytes"] = bytes;
    const std::vector<std::string> answers = samples_.empty() ? std::vector<std::string>{} : sample_answers();
    for (size_t i = 0; i < answers.size() && i < report["samples"].size(); ++i) {
      report["samples"][i]["after"] = answers[i];
    }
  }
  report.write();
}

void Run::write_card(const train::TrainResult& result) const {
  std::string card = fmt::format("---\nlibrary_name: moesaic\nbase_model: {}\ntags: [{}]\n---\n\n",
                                 Json(config_.model_name_or_path).dump(), config_.finetuning_type);
  card += fmt::format("# {} of {}\n\n", config_.finetuning_type, config_.model_name_or_path);
  card += fmt::format("Trained by moesaic {} for {} steps on {} tokens in {}; mean training loss {:.4f}{}.\n\n",
                      kVersion, result.steps, result.tokens, dtype_name(format_.dtype), result.train_loss,
                      result.best ? fmt::format(", best {} {:.4f} at step {}", result.best->metric, result.best->value,
                                                result.best->step)
                                  : "");
  if (!config_.adapters.empty()) {
    card += fmt::format("Its experts, which stayed as they were: `{}`.\n\n", fmt::join(config_.adapters, "`, `"));
  }
  card += "| data | rows | examples drawn | rate |\n|---|---|---|---|\n";
  for (const auto& count : mixture_->counts()) {
    card += fmt::format("| {} | {} | {} | {:.3f} |\n", count.name, count.rows, count.drawn, count.rate);
  }
  card += fmt::format("\nEvery setting stands in `run.yaml`. Use it with\n\n    moesaic generate {} -p \"...\"\n",
                      config_.train.output_dir.string());
  write_file_atomically(config_.train.output_dir / "README.md", card);
}

}  // namespace moesaic::run
