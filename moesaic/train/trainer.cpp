#include "moesaic/train/trainer.h"

#include <csignal>

#include "moesaic/compose/folder.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/generate/sentence.h"
#include "moesaic/moe/router.h"
#include "moesaic/train/checkpoint.h"
#include "moesaic/train/event_writer.h"
#include "moesaic/train/layer_checkpoint.h"
#include "moesaic/train/loss.h"
#include "moesaic/train/router_log.h"
#include "moesaic/train/schedules.h"

namespace moesaic::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

/// While it lives, the first SIGINT or SIGTERM asks the loop to stop; the second has its usual effect.
class StopSignal {
 public:
  StopSignal() {
    requested_ = 0;
    struct sigaction action{};
    action.sa_handler = [](int) { requested_ = 1; };
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    sigaction(SIGINT, &action, &previous_interrupt_);
    sigaction(SIGTERM, &action, &previous_terminate_);
  }
  ~StopSignal() {
    sigaction(SIGINT, &previous_interrupt_, nullptr);
    sigaction(SIGTERM, &previous_terminate_, nullptr);
  }
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;
  bool requested() const { return requested_ != 0; }

 private:
  static inline volatile std::sig_atomic_t requested_ = 0;
  struct sigaction previous_interrupt_{}, previous_terminate_{};
};

/// While it lives, operations without a deterministic algorithm throw instead of being run (where `on`).
class DeterministicAlgorithms {
 public:
  explicit DeterministicAlgorithms(bool on) {
    if (!on) return;
    context().setDeterministicAlgorithms(true, /*warn_only=*/false);
    context().setDeterministicFillUninitializedMemory(false);       // a debugging aid that costs time
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);  // without it cuBLAS has no deterministic algorithm
  }
  ~DeterministicAlgorithms() {
    context().setDeterministicAlgorithms(before_, warn_before_);
    context().setDeterministicFillUninitializedMemory(fill_before_);
  }
  DeterministicAlgorithms(const DeterministicAlgorithms&) = delete;
  DeterministicAlgorithms& operator=(const DeterministicAlgorithms&) = delete;

 private:
  static at::Context& context() { return at::globalContext(); }
  const bool before_ = context().deterministicAlgorithms();
  const bool warn_before_ = context().deterministicAlgorithmsWarnOnly();
  const bool fill_before_ = context().deterministicFillUninitializedMemory();
};

/// The examples of one micro-batch and the weight of each label's loss in the step.
struct MicroBatch {
  std::vector<data::Example> examples;
  int64_t tokens = 0;
};

/// Reads whole micro-batches. With a token limit one example is read ahead; state() is where that one still comes.
class BatchReader {
 public:
  BatchReader(data::ExampleStream& stream, const TrainConfig& config) : stream_(stream), config_(config) {}

  /// Empty at the end of the stream.
  MicroBatch next() {
    MicroBatch batch;
    while (auto example = take(batch)) {
      batch.tokens += static_cast<int64_t>(example->ids.size());
      batch.examples.push_back(std::move(*example));
    }
    return batch;
  }

  Json state() const { return ahead_ ? state_before_ : stream_.state(); }
  void set_state(const Json& state) { stream_.set_state(state); }

 private:
  std::optional<data::Example> take(const MicroBatch& batch) {
    if (config_.max_batch_tokens == 0) {
      if (static_cast<int64_t>(batch.examples.size()) == config_.per_device_train_batch_size) return std::nullopt;
      return stream_.next();
    }
    if (!ahead_) {
      state_before_ = stream_.state();
      ahead_ = stream_.next();
    }
    if (!ahead_) return std::nullopt;
    const bool fits = batch.tokens + static_cast<int64_t>(ahead_->ids.size()) <= config_.max_batch_tokens;
    if (!fits && !batch.examples.empty()) return std::nullopt;  // an example longer than the limit goes alone
    return std::exchange(ahead_, std::nullopt);
  }

  data::ExampleStream& stream_;
  const TrainConfig& config_;
  std::optional<data::Example> ahead_;
  Json state_before_;
};

/// Appends JSON lines. A resumed run first drops the lines of steps that are run again.
class JsonLines {
 public:
  JsonLines(const fs::path& path, int64_t resumed_step) {
    std::string kept;
    if (resumed_step > 0 && fs::exists(path)) {
      std::istringstream lines(read_file(path));
      for (std::string line; std::getline(lines, line);) {
        const Json row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
        if (row.is_object() && row.value("step", int64_t{0}) <= resumed_step) kept += line + "\n";
      }
    }
    write_file_atomically(path, kept);
    file_.open(path, std::ios::app);
    MOESAIC_CHECK(file_, DataError, "{}: can't be written", path.string());
  }
  void write(const Json& row) { file_ << row.dump() << std::endl; }

 private:
  std::ofstream file_;
};

/// What must not differ for a resumed run to be the same run.
Json identity(const TrainConfig& config, int64_t max_steps) {
  return {{"per_device_train_batch_size", config.per_device_train_batch_size},
          {"max_batch_tokens", config.max_batch_tokens},
          {"gradient_accumulation_steps", config.gradient_accumulation_steps},
          {"learning_rate", config.learning_rate},
          {"router_learning_rate", config.router_learning_rate},
          {"optim", config.optim},
          {"weight_decay", config.weight_decay},
          {"adam_beta1", config.adam_beta1},
          {"adam_beta2", config.adam_beta2},
          {"adam_epsilon", config.adam_epsilon},
          {"adafactor_initial_step", config.adafactor_initial_step},
          {"lr_scheduler_type", config.lr_scheduler_type},
          {"warmup_ratio", config.warmup_ratio},
          {"warmup_steps", config.warmup_steps},
          {"max_grad_norm", config.max_grad_norm},
          {"max_steps", max_steps},
          {"loss_normalization", config.loss_normalization},
          {"moe_aux_loss_coef", config.moe_aux_loss_coef},
          {"router_z_loss_coef", config.router_z_loss_coef},
          {"train_adapters", config.train_adapters},
          {"seed", config.seed}};
}

/// The vectors a sentence router reads: the batch's own, or the frozen model's view of each prompt.
torch::Tensor sentence_vectors(models::CausalLM& model, const adapters::Adapter* adapter, const data::Batch& batch,
                               const std::vector<data::Example>& examples) {
  if (batch.sentence.defined() || adapter == nullptr) return batch.sentence;
  const auto& router = adapter->config().router;
  if (router.input != "sentence" || router.sentence_source != "hidden") return {};
  std::vector<std::vector<int64_t>> prompts;
  for (const auto& example : examples) {
    const auto first_target = std::find(example.mask.begin() + 1, example.mask.end(), 1) - example.mask.begin();
    prompts.emplace_back(example.ids.begin(), example.ids.begin() + first_target);
  }
  return generate::sentence_embeddings(model, nn::RaggedBatch::from_sequences(prompts, model.device()));
}

/// What runs a batch up to the final norm.
using Layers = std::function<torch::Tensor(const data::Batch&, const std::vector<data::Example>&)>;

/// Mean cross entropy per target over `examples`, in nats.
double mean_loss(const models::CausalLM& model, const std::vector<data::Example>& examples, int64_t batch_size,
                 const Layers& layers) {
  torch::NoGradGuard no_grad;
  double sum = 0;
  int64_t targets = 0;
  for (size_t begin = 0; begin < examples.size(); begin += static_cast<size_t>(batch_size)) {
    const std::vector<data::Example> part(
        examples.begin() + static_cast<ptrdiff_t>(begin),
        examples.begin() + static_cast<ptrdiff_t>(std::min(examples.size(), begin + static_cast<size_t>(batch_size))));
    const data::Batch batch = data::collate(part, model.device());
    if (batch.num_targets() == 0) continue;
    const torch::Tensor hidden = model.final_norm(layers(batch, part).index_select(0, batch.label_rows));
    const auto ones = torch::ones({batch.num_targets()}, torch::dtype(torch::kFloat32).device(model.device()));
    sum += chunked_cross_entropy(hidden, model.head_weight(), batch.labels, ones, model.config().final_softcap)
               .item<double>();
    targets += batch.num_targets();
  }
  MOESAIC_CHECK(targets > 0, DataError, "evaluation: none of the {} examples has a token to score", examples.size());
  return sum / static_cast<double>(targets);
}

/// Throws UsageError when the trainer can't train `composition`.
void check_trainable(const compose::Composition& composition, const TrainConfig& config) {
  std::vector<std::string> wrong;
  for (const auto& entry : composition.config().augmenting) {
    if (entry.mask == "full") {
      wrong.push_back("mask full shows every position the token it shall predict; expected causal or prefix");
    }
  }
  if (config.train_adapters && composition.adapters().empty()) {
    wrong.push_back("train_adapters: none of its models carries an adapter");
  }
  MOESAIC_CHECK(wrong.empty(), UsageError, "a composition can't be trained so: {}", fmt::join(wrong, "; "));
}

/// The composed forward pass up to the final norm; prompts end where the examples' do.
torch::Tensor composed_layers(compose::Composition& composition, const data::Batch& batch, nn::ForwardContext& context,
                              const compose::TrainingPass& pass) {
  return composition.run_layers(batch.tokens, composition.align(batch.tokens, batch.prompt_ends), context, pass);
}

double composed_loss(compose::Composition& composition, const std::vector<data::Example>& examples, int64_t batch_size,
                     const compose::TrainingPass& pass) {
  return mean_loss(composition.anchor(), examples, batch_size, [&](const data::Batch& batch, const auto&) {
    nn::ForwardContext context;
    return composed_layers(composition, batch, context, pass);
  });
}

void add_adapter_tensors(adapters::Adapter& adapter, const std::string& prefix, const TrainConfig& config,
                         std::vector<OptimizedTensor>& tensors) {
  const bool vectors = adapter.config().method == "ia3" || adapter.config().method == "mov";
  for (const auto& parameter : adapter.parameters()) {
    const bool own_rate = parameter.router && config.router_learning_rate > 0;
    tensors.push_back({prefix + parameter.name, parameter.tensor,
                       own_rate ? config.router_learning_rate : config.learning_rate,
                       parameter.router || vectors ? 0.0 : config.weight_decay, false});
  }
}

class Trainer {
 public:
  Trainer(models::CausalLM& model, adapters::Adapter* adapter, compose::Composition* composition,
          data::ExampleStream& stream, const std::vector<data::Example>& eval_examples, const TrainConfig& config,
          int64_t epoch_size, const std::function<void(const StepLog&)>& on_log, const TaskEvaluation& evaluate_tasks)
      : model_(model),
        adapter_(adapter),
        composition_(composition),
        reader_(stream, config),
        eval_examples_(eval_examples),
        config_(config),
        epoch_size_(epoch_size),
        on_log_(on_log),
        evaluate_tasks_(evaluate_tasks) {
    check_config(config, epoch_size);
    const int64_t per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    max_steps_ = config.max_steps > 0
                     ? config.max_steps
                     : static_cast<int64_t>(std::ceil(static_cast<double>(epoch_size) * config.num_train_epochs /
                                                      static_cast<double>(per_step)));
    warmup_steps_ = config.warmup_steps > 0
                        ? config.warmup_steps
                        : static_cast<int64_t>(std::ceil(static_cast<double>(max_steps_) * config.warmup_ratio));
    schedule_factor(config.lr_scheduler_type, 0, warmup_steps_, max_steps_);  // an unknown type is said before the work
    if (composition != nullptr) {
      composition->train_adapters(config.train_adapters);
      open_state_cache();
    }
    tensors_ =
        composition != nullptr ? trainable_tensors(*composition, config) : trainable_tensors(model, adapter, config);
    if (config.optim == "adamw") {
      optimizer_ = make_adamw(tensors_, {config.adam_beta1, config.adam_beta2, config.adam_epsilon});
    } else {
      optimizer_ = make_adafactor(tensors_, {.initial_step = config.adafactor_initial_step});
    }
    first_trained_layer_ = first_trained_layer();
  }

  TrainResult run() {
    const DeterministicAlgorithms deterministic(config_.deterministic);
    prepare_output();
    torch::manual_seed(config_.seed);
    resume();
    open_logs();
    const int64_t first_step = step_;
    const auto begin = Clock::now();
    double loss_sum = 0;
    StopSignal stop;
    bool stopped_early = false;
    TrainResult result{};
    while (step_ < max_steps_ && !stopped_early) {
      const auto step_begin = Clock::now();
      const std::vector<MicroBatch> batches = read_step();
      if (batches.empty()) break;
      const int64_t tokens_before = tokens_;
      StepLog log = run_step(batches);
      const double step_seconds = std::chrono::duration<double>(Clock::now() - step_begin).count();
      log.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      log.tokens_per_second = static_cast<double>(tokens_ - tokens_before) / step_seconds;
      log.eta = log.seconds / static_cast<double>(step_ - first_step) * static_cast<double>(max_steps_ - step_);
      loss_sum += log.loss;
      if (on_log_) on_log_(log);
      if (step_ % config_.logging_steps == 0 || step_ == max_steps_) write_log(log);

      bool improved = false;
      if (config_.eval_steps > 0 && !eval_examples_.empty() &&
          (step_ % config_.eval_steps == 0 || step_ == max_steps_)) {
        improved = evaluate();
        stopped_early =
            config_.early_stopping_patience > 0 && evaluations_since_best_ >= config_.early_stopping_patience;
      }
      if (evaluate_tasks_ && (step_ == max_steps_ || stopped_early ||
                              (config_.task_eval_steps > 0 && step_ % config_.task_eval_steps == 0))) {
        log_task_scores();
      }
      result.interrupted = stop.requested() && step_ < max_steps_;
      const bool due = config_.save_steps > 0 &&
                       (step_ % config_.save_steps == 0 || step_ == max_steps_ || stopped_early || improved);
      if (due || result.interrupted) save(improved);
      if (result.interrupted) break;
    }
    if (stopped_early && !best_checkpoint_.empty()) load_weights(config_.output_dir / best_checkpoint_);
    if (!config_.output_dir.empty() && !result.interrupted) {
      if (adapter_ != nullptr || composition_ != nullptr) write_weights(config_.output_dir);
      write_file_atomically(config_.output_dir / "trainer_state.json", state_json().dump(2) + "\n");
    }
    result.steps = step_;
    result.train_loss = step_ > first_step ? loss_sum / static_cast<double>(step_ - first_step) : 0.0;
    result.best_eval_loss = best_eval_loss_;
    result.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    result.tokens = tokens_;
    if (states_ && states_->hits() + states_->misses() > 0) {
      spdlog::info("frozen states: {} of {} sequences from the cache, which holds {:.1f} MiB", states_->hits(),
                   states_->hits() + states_->misses(), static_cast<double>(states_->bytes()) / (1 << 20));
    }
    return result;
  }

 private:
  static constexpr double kGib = 1 << 30;

  /// Frozen states are kept where they are needed again: in another epoch, another evaluation or another run.
  void open_state_cache() {
    const int64_t examples = max_steps_ * config_.per_device_train_batch_size * config_.gradient_accumulation_steps;
    const bool again = (epoch_size_ > 0 && (config_.max_batch_tokens > 0 || examples > epoch_size_)) ||
                       (config_.eval_steps > 0 && !eval_examples_.empty()) || !config_.state_cache_dir.empty();
    if (!again || config_.state_cache_gib <= 0) return;
    states_.emplace(static_cast<int64_t>(config_.state_cache_gib * kGib), config_.state_cache_dir);
  }
  compose::TrainingPass composed_pass() { return {states_ ? &*states_ : nullptr, nullptr}; }

  bool writes_files() const { return !config_.output_dir.empty(); }
  bool reports_to(const std::string& target) const {
    return writes_files() &&
           std::find(config_.report_to.begin(), config_.report_to.end(), target) != config_.report_to.end();
  }

  void prepare_output() {
    if (!writes_files()) return;
    fs::create_directories(config_.output_dir);
    const auto checkpoints = list_checkpoints(config_.output_dir);
    if (config_.overwrite_output_dir) {
      remove_checkpoints(config_.output_dir);
    } else if (config_.resume_from_checkpoint == "none" && !checkpoints.empty()) {
      throw UsageError(
          fmt::format("output_dir {}: got a folder with {} of an earlier run, expected none\nhint: go on "
                      "with --resume auto, start anew with overwrite_output_dir=true, or choose another "
                      "output_dir",
                      config_.output_dir.string(), checkpoints.back().path.filename().string()));
    }
  }

  void open_logs() {
    if (reports_to("jsonl")) {
      log_.emplace(config_.output_dir / "train_log.jsonl", step_);
      router_log_.emplace(config_.output_dir / "router_stats.jsonl", step_);
    }
    if (reports_to("tensorboard")) events_.emplace(config_.output_dir / "tensorboard");
  }

  std::vector<MicroBatch> read_step() {
    std::vector<MicroBatch> batches;
    for (int64_t i = 0; i < config_.gradient_accumulation_steps; ++i) {
      MicroBatch batch = reader_.next();
      if (batch.examples.empty()) break;
      batches.push_back(std::move(batch));
    }
    return batches;
  }

  /// Forward and backward of every micro-batch, clipping, one update.
  StepLog run_step(const std::vector<MicroBatch>& batches) {
    int64_t targets = 0, sequences = 0, tokens = 0;
    for (const auto& batch : batches) {
      tokens += batch.tokens;
      for (const auto& example : batch.examples) {
        targets += example.targets();
        sequences += example.targets() > 0;
        ++examples_;
      }
    }
    MOESAIC_CHECK(targets > 0, DataError, "step {}: none of its examples has a token to train on", step_ + 1);
    const bool logs_routing = reports_to("jsonl") && (step_ + 1) % config_.logging_steps == 0;
    for (auto& t : tensors_) t.tensor.mutable_grad() = torch::Tensor();

    torch::Tensor loss, aux_loss;
    routing_ = {};
    for (const auto& batch : batches) {
      const data::Batch collated = data::collate(batch.examples, model_.device());
      const auto share = static_cast<double>(batch.tokens) / static_cast<double>(tokens);
      const auto parts =
          batch_loss(collated, batch, row_weights(collated, batch, targets, sequences), share, logs_routing);
      const auto total = parts.second.defined() ? parts.first + parts.second : parts.first;
      if (total.requires_grad()) total.backward();
      loss = loss.defined() ? loss + parts.first.detach() : parts.first.detach();
      if (parts.second.defined()) {
        aux_loss = aux_loss.defined() ? aux_loss + parts.second.detach() : parts.second.detach();
      }
    }

    StepLog log{};
    log.loss = loss.item<double>();
    log.aux_loss = aux_loss.defined() ? aux_loss.item<double>() : 0.0;
    log.grad_norm = clip_gradients(tensors_, config_.max_grad_norm);
    if (!std::isfinite(log.loss + log.aux_loss) || !std::isfinite(log.grad_norm)) report_divergence(batches, log);
    const double factor = schedule_factor(config_.lr_scheduler_type, step_, warmup_steps_, max_steps_);
    optimizer_->step(factor);
    ++step_;
    tokens_ += tokens;
    window_loss_ += log.loss;
    window_aux_loss_ += log.aux_loss;
    ++window_steps_;
    log.step = step_;
    log.max_steps = max_steps_;
    log.learning_rate = config_.learning_rate * factor;
    log.tokens = tokens_;
    return log;
  }

  /// [M]: the weight of each label's cross entropy in the step's loss.
  torch::Tensor row_weights(const data::Batch& collated, const MicroBatch& batch, int64_t targets,
                            int64_t sequences) const {
    if (config_.loss_normalization == "tokens") {
      return torch::full({collated.num_targets()}, 1.0 / static_cast<double>(targets),
                         torch::dtype(torch::kFloat32).device(model_.device()));
    }
    std::vector<float> per_sequence;
    for (const auto& example : batch.examples) {
      per_sequence.push_back(
          static_cast<float>(1.0 / static_cast<double>(std::max<int64_t>(1, example.targets()) * sequences)));
    }
    return torch::tensor(per_sequence).to(model_.device()).index_select(0, collated.label_sequences);
  }

  /// Sum over a layer's or a model's records of the auxiliary losses with their coefficients; undefined when off.
  torch::Tensor routing_loss(const std::vector<nn::RoutingRecord>& records) const {
    torch::Tensor sum;
    auto add = [&](double coefficient, const torch::Tensor& value) {
      sum = sum.defined() ? sum + coefficient * value : coefficient * value;
    };
    for (const auto& record : records) {
      if (config_.moe_aux_loss_coef > 0) add(config_.moe_aux_loss_coef, moe::balance_loss(record));
      if (config_.router_z_loss_coef > 0) add(config_.router_z_loss_coef, moe::z_loss(record));
    }
    return sum;
  }

  /// One layer that runs again in the backward pass; its routing's loss is added to `aux`.
  torch::Tensor checkpointed(int64_t layer, const torch::Tensor& h, nn::ForwardContext& context, torch::Tensor& aux) {
    const auto result = run_layer_checkpointed(
        model_, layer, h, context, [this](const auto& layer_records) { return routing_loss(layer_records); });
    aux = aux.defined() ? aux + result.routing_loss : result.routing_loss;
    return result.hidden;
  }

  /// The cross-entropy part and the routers' part (undefined when off) of the step's loss that this micro-batch makes.
  std::pair<torch::Tensor, torch::Tensor> batch_loss(const data::Batch& collated, const MicroBatch& batch,
                                                     const torch::Tensor& weights, double share, bool logs_routing) {
    const bool has_aux = config_.moe_aux_loss_coef > 0 || config_.router_z_loss_coef > 0;
    std::vector<nn::RoutingRecord> records;
    nn::ForwardContext context;
    context.training = true;
    context.sentence = sentence_vectors(model_, adapter_, collated, batch.examples);
    if (has_aux || logs_routing) context.routing = &records;
    torch::Tensor hidden, aux;
    const int64_t layers = model_.config().num_layers;
    if (composition_ != nullptr) {
      compose::TrainingPass pass = composed_pass();
      if (config_.gradient_checkpointing) {
        pass.run_block = [&](int64_t layer, const torch::Tensor& h) { return checkpointed(layer, h, context, aux); };
      }
      hidden = composed_layers(*composition_, collated, context, pass);
      if (!config_.gradient_checkpointing) aux = routing_loss(records);
    } else {
      model_.prepare(collated.tokens, context);
      hidden = model_.embed(collated.tokens.tokens);
      if (config_.gradient_checkpointing) {
        hidden = model_.run_layers(hidden, 0, first_trained_layer_, context);
        for (int64_t layer = first_trained_layer_; layer < layers; ++layer) {
          hidden = checkpointed(layer, hidden, context, aux);
        }
      } else {
        hidden = model_.run_layers(hidden, 0, layers, context);
        aux = routing_loss(records);
      }
    }
    if (logs_routing) routing_.add(records);
    hidden = model_.final_norm(hidden.index_select(0, collated.label_rows));
    const auto loss =
        chunked_cross_entropy(hidden, model_.head_weight(), collated.labels, weights, model_.config().final_softcap);
    if (!has_aux || records.empty()) return {loss, torch::Tensor()};
    return {loss, aux * (share / static_cast<double>(records.size()))};
  }

  /// The first layer that has something to train: layers below run without a graph.
  int64_t first_trained_layer() const {
    if (adapter_ == nullptr) return 0;
    int64_t first = model_.config().num_layers;
    auto visit = [&](const std::string& site, int64_t layer) {
      for (const auto& t : tensors_) {
        if (t.name.starts_with(site + ".")) first = std::min(first, layer);
      }
    };
    for (const auto& site : model_.sites().linears) visit(site.name, site.layer);
    for (const auto& site : model_.sites().scales) visit(site.name, site.layer);
    return first;
  }

  [[noreturn]] void report_divergence(const std::vector<MicroBatch>& batches, const StepLog& log) {
    std::string where;
    torch::NoGradGuard no_grad;
    const auto searched = composition_ != nullptr ? std::span<const MicroBatch>() : std::span(batches);
    for (const auto& batch : searched) {
      const auto collated = data::collate(batch.examples, model_.device());
      nn::ForwardContext context;
      context.sentence = sentence_vectors(model_, adapter_, collated, batch.examples);
      model_.prepare(collated.tokens, context);
      torch::Tensor hidden = model_.embed(collated.tokens.tokens);
      for (int64_t layer = 0; layer < model_.config().num_layers && where.empty(); ++layer) {
        hidden = model_.run_layers(hidden, layer, layer + 1, context);
        if (!hidden.isfinite().all().item<bool>()) where = fmt::format("the output of layer {}", layer);
      }
    }
    for (const auto& t : tensors_) {
      if (where.empty() && t.tensor.grad().defined() && !t.tensor.grad().isfinite().all().item<bool>()) {
        where = "the gradient of " + t.name;
      }
    }
    throw DataError(fmt::format(
        "step {}: training diverged: loss {}, gradient norm {}; first not finite: {}\nhint: a lower learning_rate or a "
        "longer warm-up; nothing was saved, earlier checkpoints are as they were",
        step_ + 1, log.loss, log.grad_norm, where.empty() ? "the loss itself" : where));
  }

  void write_log(const StepLog& log) {
    Json row{{"step", log.step},
             {"loss", window_loss_ / static_cast<double>(window_steps_)},
             {"learning_rate", log.learning_rate},
             {"grad_norm", log.grad_norm}};
    if (epoch_size_ > 0) row["epoch"] = static_cast<double>(examples_) / static_cast<double>(epoch_size_);
    if (config_.moe_aux_loss_coef > 0 || config_.router_z_loss_coef > 0) {
      row["aux_loss"] = window_aux_loss_ / static_cast<double>(window_steps_);
    }
    window_loss_ = window_aux_loss_ = 0;
    window_steps_ = 0;
    history_.push_back(row);
    row["tokens"] = log.tokens;
    row["tokens_per_second"] = log.tokens_per_second;
    if (log_) log_->write(row);
    report_events("train/", row);
    if (router_log_ && !routing_.empty()) {
      Json stats = routing_.summary();
      stats["step"] = log.step;
      stats["split"] = "train";
      router_log_->write(stats);
      if (const auto [share, site] = routing_.largest_share(); share > 0.9 && !warned_of_collapse_) {
        spdlog::warn(
            "step {}: one expert has {:.0f} % of the weight at {}: the router collapsed; try a lower "
            "router_learning_rate or moe_aux_loss_coef",
            log.step, 100 * share, site);
        warned_of_collapse_ = true;
      }
    }
  }

  void report_events(const std::string& prefix, const Json& row) {
    if (!events_) return;
    for (const auto& [key, value] : row.items()) {
      if (key != "step" && value.is_number()) events_->add_scalar(prefix + key, value.get<double>(), step_);
    }
    events_->flush();
  }

  void log_task_scores() {
    Json row = Json::object();
    std::string text;
    for (const auto& [name, value] : evaluate_tasks_()) {
      row[name] = value;
      text += fmt::format(", {} {:.4f}", name, value);
    }
    report_events("eval/", row);
    spdlog::info("step {}{}", step_, text);
    Json logged{{"step", step_}};
    for (const auto& [name, value] : row.items()) logged["eval/" + name] = value;
    history_.push_back(logged);
    if (log_) log_->write(logged);
  }

  /// True when this is the best so far.
  bool evaluate() {
    const int64_t batch_size = config_.per_device_train_batch_size;
    const double loss = composition_ != nullptr
                            ? composed_loss(*composition_, eval_examples_, batch_size, composed_pass())
                            : evaluate_loss(model_, adapter_, eval_examples_, batch_size);
    Json row{{"step", step_}, {"eval_loss", loss}};
    history_.push_back(row);
    if (log_) log_->write(row);
    report_events("eval/", row);
    spdlog::info("step {}: eval loss {:.4f}", step_, loss);
    const bool improved = !best_eval_loss_ || loss < *best_eval_loss_;
    if (improved) {
      best_eval_loss_ = loss;
      evaluations_since_best_ = 0;
    } else {
      ++evaluations_since_best_;
    }
    return improved;
  }

  Json state_json() const {
    Json state{{"global_step", step_},
               {"max_steps", max_steps_},
               {"num_input_tokens_seen", tokens_},
               {"logging_steps", config_.logging_steps},
               {"eval_steps", config_.eval_steps},
               {"save_steps", config_.save_steps},
               {"train_batch_size", config_.per_device_train_batch_size},
               {"best_metric", best_eval_loss_ ? Json(*best_eval_loss_) : Json()},
               {"best_model_checkpoint", best_checkpoint_.empty() ? Json() : Json(best_checkpoint_)},
               {"log_history", history_}};
    if (epoch_size_ > 0) state["epoch"] = static_cast<double>(examples_) / static_cast<double>(epoch_size_);
    state["moesaic"] = {{"sampler", reader_.state()},
                        {"examples", examples_},
                        {"window_loss", window_loss_},
                        {"window_aux_loss", window_aux_loss_},
                        {"window_steps", window_steps_},
                        {"evaluations_since_best", evaluations_since_best_},
                        {"config", identity(config_, max_steps_)}};
    return state;
  }

  void save(bool is_best) {
    if (!writes_files()) return;
    if (is_best) best_checkpoint_ = fmt::format("checkpoint-{}", step_);
    TrainerCheckpoint checkpoint{state_json(), optimizer_->state()};
    const auto random = random_state(model_.device());
    checkpoint.tensors["random.cpu"] = random[0];
    if (random.size() > 1) checkpoint.tensors["random.device"] = random[1];
    write_checkpoint(config_.output_dir, step_, checkpoint, [this](const fs::path& dir) { write_weights(dir); });
    rotate_checkpoints(config_.output_dir, config_.save_total_limit, best_checkpoint_);
  }

  void write_weights(const fs::path& dir) const {
    if (composition_ != nullptr) return compose::save_composition(*composition_, dir);
    if (adapter_ != nullptr) return adapter_->save(dir);
    formats::TensorMap weights;
    for (const auto& t : tensors_) weights[t.name] = t.tensor.detach();
    formats::save_safetensors(dir / "model.safetensors", weights);
  }

  void load_weights(const fs::path& dir) {
    if (composition_ != nullptr) return compose::load_trained(*composition_, dir);
    if (adapter_ != nullptr) return adapter_->load_tensors(formats::read_adapter_folder(dir).tensors);
    torch::NoGradGuard no_grad;
    const formats::SafetensorsFile file(dir / "model.safetensors");
    for (auto& t : tensors_) {
      MOESAIC_CHECK(file.contains(t.name) && file.shape(t.name) == t.tensor.sizes(), DataError,
                    "{}: {} is missing or of another shape; expected a checkpoint of this model", dir.string(), t.name);
      t.tensor.copy_(file.tensor(t.name));
    }
  }

  void resume() {
    if (config_.resume_from_checkpoint == "none") return;
    fs::path dir = config_.resume_from_checkpoint;
    if (config_.resume_from_checkpoint == "auto") {
      const auto checkpoints = list_checkpoints(config_.output_dir);
      if (checkpoints.empty()) return;
      dir = checkpoints.back().path;
    }
    TrainerCheckpoint checkpoint = read_checkpoint(dir);
    const std::string where = (dir / "trainer_state.json").string();
    const Json own = get<Json>(checkpoint.state, "moesaic", where);
    const Json saved = get<Json>(own, "config", where);
    const Json wanted = identity(config_, max_steps_);
    for (const auto& [key, value] : wanted.items()) {
      if (saved.contains(key) && saved.at(key) != value) {
        spdlog::warn("{}: was made with {} {}, this run has {}: it goes on with {}", dir.string(), key,
                     saved.at(key).dump(), value.dump(), value.dump());
      }
    }
    load_weights(dir);
    std::vector<torch::Tensor> random;
    for (const char* name : {"random.cpu", "random.device"}) {
      if (auto node = checkpoint.tensors.extract(name)) random.push_back(node.mapped().clone());
    }
    optimizer_->load_state(checkpoint.tensors);
    const size_t expected = model_.device().is_cpu() ? 1 : 2;
    MOESAIC_CHECK(random.size() == expected, DataError,
                  "{}: got {} random generator states, expected {}: it was made on another kind of device",
                  dir.string(), random.size(), expected);
    set_random_state(model_.device(), random);
    reader_.set_state(get<Json>(own, "sampler", where));
    step_ = get<int64_t>(checkpoint.state, "global_step", where);
    tokens_ = get<int64_t>(checkpoint.state, "num_input_tokens_seen", where);
    history_ = get<Json>(checkpoint.state, "log_history", where);
    if (const Json& best = checkpoint.state.at("best_metric"); !best.is_null()) best_eval_loss_ = best.get<double>();
    best_checkpoint_ = get_or<std::string>(checkpoint.state, "best_model_checkpoint", "", where);
    examples_ = get<int64_t>(own, "examples", where);
    window_loss_ = get<double>(own, "window_loss", where);
    window_aux_loss_ = get<double>(own, "window_aux_loss", where);
    window_steps_ = get<int64_t>(own, "window_steps", where);
    evaluations_since_best_ = get<int64_t>(own, "evaluations_since_best", where);
    spdlog::info("resumed from {} at step {} of {}", dir.string(), step_, max_steps_);
  }

  models::CausalLM& model_;
  adapters::Adapter* adapter_;
  compose::Composition* composition_;  // nullptr, or what is trained; model_ is then its anchor
  std::optional<compose::StateCache> states_;
  BatchReader reader_;
  const std::vector<data::Example>& eval_examples_;
  const TrainConfig& config_;
  int64_t epoch_size_;
  const std::function<void(const StepLog&)>& on_log_;
  const TaskEvaluation& evaluate_tasks_;

  std::vector<OptimizedTensor> tensors_;
  std::unique_ptr<Optimizer> optimizer_;
  int64_t max_steps_ = 0, warmup_steps_ = 0, first_trained_layer_ = 0;

  int64_t step_ = 0, tokens_ = 0, examples_ = 0;
  double window_loss_ = 0, window_aux_loss_ = 0;  // sums since the last log
  int64_t window_steps_ = 0;
  Json history_ = Json::array();
  std::optional<double> best_eval_loss_;
  std::string best_checkpoint_;  // folder name in output_dir
  int64_t evaluations_since_best_ = 0;

  RouterLog routing_;
  bool warned_of_collapse_ = false;
  std::optional<JsonLines> log_, router_log_;
  std::optional<EventWriter> events_;
};

}  // namespace

void check_config(const TrainConfig& config, int64_t epoch_size) {
  std::vector<std::string> wrong;
  auto require = [&](bool ok, const std::string& message) {
    if (!ok) wrong.push_back(message);
  };
  require(config.per_device_train_batch_size > 0, "per_device_train_batch_size must be at least 1");
  require(config.gradient_accumulation_steps > 0, "gradient_accumulation_steps must be at least 1");
  require(config.max_batch_tokens >= 0, "max_batch_tokens must not be negative");
  require(std::isfinite(config.learning_rate) && config.learning_rate >= 0, "learning_rate must not be negative");
  require(std::isfinite(config.router_learning_rate) && config.router_learning_rate >= 0,
          "router_learning_rate must not be negative");
  require(config.optim == "adamw" || config.optim == "adafactor",
          fmt::format("optim: got '{}', expected adamw or adafactor", config.optim));
  require(config.loss_normalization == "tokens" || config.loss_normalization == "sequences",
          fmt::format("loss_normalization: got '{}', expected tokens or sequences", config.loss_normalization));
  require(config.max_steps > 0 || (epoch_size > 0 && config.num_train_epochs > 0),
          "give max_steps, or num_train_epochs with data of known size");
  require(config.max_steps > 0 || config.max_batch_tokens == 0,
          "max_batch_tokens needs max_steps: how many steps an epoch has is not known before");
  require(config.warmup_ratio >= 0 && config.warmup_ratio <= 1, "warmup_ratio must lie in 0..1");
  require(config.logging_steps > 0, "logging_steps must be at least 1");
  require(config.task_eval_steps >= 0, "eval.steps must not be negative");
  require(std::isfinite(config.state_cache_gib) && config.state_cache_gib >= 0, "state_cache_gib must not be negative");
  for (const std::string& target : config.report_to) {
    require(target == "jsonl" || target == "tensorboard" || target == "none",
            fmt::format("report_to: got '{}', expected jsonl, tensorboard or none", target));
  }
  require(config.early_stopping_patience == 0 ||
              (config.eval_steps > 0 && config.save_steps > 0 && !config.output_dir.empty()),
          "early_stopping_patience needs eval_steps, save_steps and output_dir: the best weights are a checkpoint");
  MOESAIC_CHECK(wrong.empty(), UsageError, "run config: {}", fmt::join(wrong, "; "));
}

std::vector<OptimizedTensor> trainable_tensors(models::CausalLM& model, adapters::Adapter* adapter,
                                               const TrainConfig& config) {
  std::vector<OptimizedTensor> tensors;
  if (adapter == nullptr) {
    std::set<void*> seen;
    for (const auto& item : model.named_parameters()) {
      torch::Tensor tensor = item.value();
      if (!seen.insert(tensor.data_ptr()).second) continue;  // tied
      tensor.set_requires_grad(true);
      const bool matrix = tensor.dim() == 2;
      tensors.push_back({item.key(), tensor, config.learning_rate, matrix ? config.weight_decay : 0.0, matrix});
    }
    return tensors;
  }
  add_adapter_tensors(*adapter, "", config, tensors);
  return tensors;
}

std::vector<OptimizedTensor> trainable_tensors(compose::Composition& composition, const TrainConfig& config) {
  check_trainable(composition, config);
  std::vector<OptimizedTensor> tensors;
  for (const auto& item : composition.named_parameters()) {
    const bool matrix = item.value().dim() == 2;
    tensors.push_back({item.key(), item.value(), config.learning_rate, matrix ? config.weight_decay : 0.0, false});
  }
  if (!composition.trains_adapters()) return tensors;
  for (const auto& [place, adapter] : composition.adapters()) {
    add_adapter_tensors(*adapter, place + ".", config, tensors);
  }
  return tensors;
}

double evaluate_loss(models::CausalLM& model, const adapters::Adapter* adapter,
                     const std::vector<data::Example>& examples, int64_t batch_size) {
  return mean_loss(model, examples, batch_size, [&](const data::Batch& batch, const auto& part) {
    nn::ForwardContext context;
    context.sentence = sentence_vectors(model, adapter, batch, part);
    model.prepare(batch.tokens, context);
    return model.run_layers(model.embed(batch.tokens.tokens), 0, model.config().num_layers, context);
  });
}

double evaluate_loss(compose::Composition& composition, const std::vector<data::Example>& examples,
                     int64_t batch_size) {
  return composed_loss(composition, examples, batch_size, {});
}

TrainResult train(models::CausalLM& model, adapters::Adapter* adapter, data::ExampleStream& stream,
                  const std::vector<data::Example>& eval_examples, const TrainConfig& config, int64_t epoch_size,
                  const std::function<void(const StepLog&)>& on_log, const TaskEvaluation& evaluate_tasks) {
  return Trainer(model, adapter, nullptr, stream, eval_examples, config, epoch_size, on_log, evaluate_tasks).run();
}

TrainResult train(compose::Composition& composition, data::ExampleStream& stream,
                  const std::vector<data::Example>& eval_examples, const TrainConfig& config, int64_t epoch_size,
                  const std::function<void(const StepLog&)>& on_log, const TaskEvaluation& evaluate_tasks) {
  return Trainer(composition.anchor(), nullptr, &composition, stream, eval_examples, config, epoch_size, on_log,
                 evaluate_tasks)
      .run();
}

}  // namespace moesaic::train
