// moesaic train: a run file becomes an adapter, the connections of a composition, or a model.
#include <iostream>

#include "cli/load.h"
#include "cli/new_model.h"
#include "moesaic/base/device.h"
#include "moesaic/base/progress.h"
#include "moesaic/base/seed.h"
#include "moesaic/base/yaml.h"
#include "moesaic/compose/folder.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/models/initialize.h"
#include "moesaic/train/memory.h"
#include "moesaic/train/run_config.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct TrainOptions {
  std::string run;                     // run.yaml
  std::vector<std::string> overrides;  // key=value
  std::string resume;                  // auto | none | DIR; "" = the run's own key
  bool dry_run = false;
};

/// `text` as one word of a shell's command.
std::string shell_word(const std::string& text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || c >= 0x80 || std::strchr("_-+=.,:/@%", c) != nullptr;
  });
  if (plain) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? "'\\''" : std::string(1, c);
  return word + "'";
}

/// Everything a run needs, made in the order of its dependencies.
class TrainCommand {
 public:
  TrainCommand(const TrainOptions& options, train::RunConfig run)
      : options_(options),
        run_(std::move(run)),
        device_(parse_device(run_.device)),
        dtype_(parse_dtype(run_.dtype, device_)) {}

  int execute() {
    open_model();
    attach_adapter();
    open_data();
    open_tasks();
    train::check_config(run_.train, mixture_->epoch_size());
    checkpoint_.reset();  // unmaps the files: the weights are copied
    describe();
    if (options_.dry_run) {
      describe_memory();
      return 0;
    }
    write_inputs();
    return train_and_finish();
  }

 private:
  bool full() const { return run_.finetuning_type == "full"; }
  bool composed() const { return run_.finetuning_type == "calm"; }

  void open_model() {
    const bool random = run_.init == "random";
    const bool is_composition = compose::is_composition(run_.model_name_or_path);
    MOESAIC_CHECK(composed() == is_composition, UsageError,
                  "finetuning_type {}: model_name_or_path {} is {}, expected {}", run_.finetuning_type,
                  run_.model_name_or_path, is_composition ? "a composition" : "none of `moesaic compose`",
                  composed() ? "a composition's folder" : "a single model, or finetuning_type calm");
    if (composed()) {
      MOESAIC_CHECK(!fs::exists(run_.train.output_dir / "config.json"), UsageError,
                    "output_dir {}: got a folder that holds a model, expected another for the composition",
                    run_.train.output_dir.string());
      composition_ = compose::load_composition(run_.model_name_or_path, {.dtype = dtype_, .device = device_});
      composition_->train_adapters(run_.train.train_adapters);
      checkpoint_ = composition_->anchor_member().checkpoint;
    } else if (random) {
      NewModel made = open_new_model(run_);
      checkpoint_ = made.checkpoint;
      tokenizer_origin_ = made.tokenizer;
    } else {
      checkpoint_ = formats::Checkpoint::open(run_.model_name_or_path);
    }
    config_ = checkpoint_->config();
    generation_config_ = checkpoint_->generation_config();
    chat_template_ = checkpoint_->chat_template();
    const auto config = models::parse_decoder_config(config_, run_.model_name_or_path);
    if (composed()) {
      model_ = composition_->anchor_member().model;
    } else if (options_.dry_run) {
      model_ = std::make_shared<models::CausalLM>(config, torch::dtype(dtype_).device(torch::kMeta));
    } else if (random) {
      model_ = std::make_shared<models::CausalLM>(config, torch::dtype(dtype_).device(device_));
      models::initialize(*model_, derive_seed(run_.train.seed, "init"));
    } else {
      model_ = models::CausalLM::load(*checkpoint_, {.dtype = dtype_, .device = device_});
    }
    for (const auto& parameter : model_->parameters()) base_parameters_ += parameter.numel();
  }

  void attach_adapter() {
    if (full() || composed()) return;
    auto config = run_.adapter;
    const bool no_targets = std::visit([](const auto& targets) { return targets.empty(); }, config.targets);
    if (no_targets) config = adapters::resolve_targets(config, run_.target_preset);
    config.base_model_name_or_path = run_.model_name_or_path;
    config.base_dtype = dtype_name(dtype_);
    if (run_.init == "pretrained" && !options_.dry_run) config.base_fingerprint = checkpoint_->fingerprint();
    adapter_ = adapters::Adapter::create(config, model_->sites(), options_.dry_run ? torch::kMeta : device_,
                                         derive_seed(run_.train.seed, "adapter"));
    if (!run_.adapter_name_or_path.empty() && !options_.dry_run) {
      adapter_->load_tensors(formats::read_adapter_folder(run_.adapter_name_or_path).tensors);
    }
  }

  void open_data() {
    renderer_ = data::Renderer::open(*checkpoint_, run_.render);
    auto datasets = data::resolve_datasets(run_.dataset, run_.dataset_dir);
    auto [training, validation] = data::train_validation(std::move(datasets), run_.val_size, run_.train.seed);
    if (!run_.eval_dataset.is_null()) {
      for (auto& config : data::resolve_datasets(run_.eval_dataset, run_.dataset_dir)) validation.push_back(config);
    }
    mixture_ = std::make_unique<data::Mixture>(std::move(training), renderer_, derive_seed(run_.train.seed, "mixture"),
                                               run_.mixture_rule);
    if (!validation.empty()) eval_examples_ = data::load_examples(validation, *renderer_);
    if (run_.train.eval_steps > 0 && eval_examples_.empty()) {
      throw UsageError("eval_steps: got no evaluation data; give val_size or eval_dataset");
    }
  }

  void open_tasks() {
    if (!run_.eval_tasks.empty()) tasks_ = eval::load_tasks(run_.eval_tasks, {.limit = run_.eval_limit});
    for (const eval::Task& task : tasks_) eval::check_metrics(task, {});
  }

  /// {"<task>/<metric>", value} for every task: asked as training renders its data.
  std::vector<std::pair<std::string, double>> task_scores() {
    eval::EvalModel model{*model_, renderer_->tokenizer(), renderer_->chat_template()};
    model.composition = composition_.get();
    if (adapter_ && adapter_->config().router.input == "sentence") {
      const bool hidden = adapter_->config().router.sentence_source == "hidden";
      (hidden ? model.sentence_from_hidden : model.sentence_from_column) = true;
    }
    eval::EvalOptions options;
    options.apply_chat_template = model.chat_template != nullptr;
    options.target_delimiter = "";  // as in training, where nothing stands between prompt and answer
    options.generation.max_new_tokens = 128;
    options.generation.eos_ids = eos_ids(*model_, generation_config_, &renderer_->tokenizer());
    std::vector<std::pair<std::string, double>> scores;
    for (const eval::Task& task : tasks_) {
      for (const auto& [metric, mean] : eval::evaluate(model, task, options).metrics) {
        scores.emplace_back(task.name + "/" + metric, mean.value);
      }
    }
    return scores;
  }

  std::vector<std::string> augmenting_paths() const {
    std::vector<std::string> paths;
    for (const auto& member : composition_->augmenting()) paths.push_back(member.checkpoint->path().string());
    return paths;
  }

  void describe() {
    fmt::print("model      {} ({}, {} parameters, {} on {})\n", run_.model_name_or_path, model_->config().model_type,
               format_count(static_cast<double>(base_parameters_)), dtype_name(dtype_), device_.str());
    if (!tokenizer_origin_.empty()) fmt::print("tokenizer  {}\n", tokenizer_origin_);
    int64_t trainable = base_parameters_;
    if (composed()) {
      trainable = 0;
      for (const auto& tensor : train::trainable_tensors(*composition_, run_.train)) trainable += tensor.tensor.numel();
      fmt::print("method     calm, augmenting {}\n", fmt::join(augmenting_paths(), ", "));
      for (const auto& [place, adapter] : composition_->adapters()) {
        fmt::print("adapter    {} of the {}, {}\n", adapter->config().method, place,
                   run_.train.train_adapters ? "trained too" : "frozen");
      }
    } else if (!full()) {
      trainable = 0;
      for (const auto& parameter : adapter_->parameters()) trainable += parameter.tensor.numel();
      const auto& config = adapter_->config();
      fmt::print("method     {}{}\n", config.method,
                 config.num_experts > 1
                     ? fmt::format(", {} experts, {} router on {}", adapters::experts_json(config).dump(),
                                   config.router.type, config.router.input)
                     : "");
      std::vector<std::string> hits;
      for (const auto& [pattern, count] : adapter_->matches()) hits.push_back(fmt::format("{} {}", pattern, count));
      fmt::print("sites      {}\n", fmt::join(hits, ", "));
    }
    fmt::print("trainable  {} ({:.4f} % of {})\n", trainable,
               100.0 * static_cast<double>(trainable) / static_cast<double>(base_parameters_), base_parameters_);
    const bool unused = !eval_examples_.empty() && run_.train.eval_steps == 0;
    fmt::print("data       {} examples an epoch, {} for evaluation{}\n", mixture_->epoch_size(), eval_examples_.size(),
               unused ? " (never: eval_steps is 0)" : "");
    for (const auto& count : mixture_->counts()) {
      fmt::print("           {}: {} rows, rate {:.3f}\n", count.name, count.rows, count.rate);
    }
    std::fflush(stdout);
  }

  /// The largest of the run's first micro-batches stands for all.
  void describe_memory() {
    int64_t most_tokens = 0, most_targets = 0, tokens = 0, targets = 0;
    constexpr int64_t kSampled = 32;
    for (int64_t i = 0; i < kSampled; ++i) {
      tokens = targets = 0;
      for (int64_t n = 0; run_.train.max_batch_tokens > 0 || n < run_.train.per_device_train_batch_size; ++n) {
        const auto example = mixture_->next();
        if (!example) break;
        const auto length = static_cast<int64_t>(example->ids.size());
        if (run_.train.max_batch_tokens > 0 && n > 0 && tokens + length > run_.train.max_batch_tokens) break;
        tokens += length;
        targets += example->targets();
      }
      most_tokens = std::max(most_tokens, tokens);
      most_targets = std::max(most_targets, targets);
    }
    const auto estimate = composed() ? train::estimate_memory(*composition_, run_.train, most_tokens, most_targets)
                                     : train::estimate_memory(*model_, adapter_.get(), run_.train, most_tokens,
                                                              most_targets, dtype_, device_);
    fmt::print("memory     {:.0f} MiB for micro-batches of up to {} tokens ({} targets), the largest of {} drawn\n",
               static_cast<double>(estimate.total()) / (1 << 20), most_tokens, most_targets, kSampled);
    for (const auto& [name, bytes] : estimate.parts) {
      fmt::print("           {:<18}{:>8.1f} MiB\n", name, static_cast<double>(bytes) / (1 << 20));
    }
  }

  void write_inputs() const {
    const fs::path& dir = run_.train.output_dir;
    fs::create_directories(dir);
    write_file_atomically(dir / "run.yaml", to_yaml(run_.resolved));
    if (composed()) return;  // the folder names the models that bring their own
    write_file_atomically(dir / "tokenizer.json", renderer_->tokenizer().json());
    write_file_atomically(dir / "tokenizer_config.json", renderer_->tokenizer().config().dump(2) + "\n");
    if (chat_template_) write_file_atomically(dir / "chat_template.jinja", *chat_template_);
  }

  int train_and_finish() {
    std::unique_ptr<Progress> progress;
    auto show = [&](const train::StepLog& log) {
      if (!progress) progress = std::make_unique<Progress>("train", log.max_steps, log.step - 1);
      progress->update(log.step,
                       fmt::format("loss {:.4f}, {} tokens/s", log.loss, format_count(log.tokens_per_second)));
    };
    train::TaskEvaluation evaluate_tasks;
    if (!tasks_.empty()) evaluate_tasks = [this] { return task_scores(); };
    const int64_t epoch = mixture_->epoch_size();
    const auto result =
        composed()
            ? train::train(*composition_, *mixture_, eval_examples_, run_.train, epoch, show, evaluate_tasks)
            : train::train(*model_, adapter_.get(), *mixture_, eval_examples_, run_.train, epoch, show, evaluate_tasks);
    if (progress) progress->finish();
    if (result.interrupted) {
      std::string command = "moesaic train " + shell_word(options_.run);
      for (const std::string& word : options_.overrides) command += " " + shell_word(word);
      fmt::print(stderr, "stopped after step {}; go on with:\n  {} --resume auto\n", result.steps, command);
      return static_cast<int>(ExitCode::kInterrupted);
    }
    if (full()) write_model();
    write_model_card(result);
    fmt::print("done       step {}, train loss {:.4f}{}, {} in {}\n", result.steps, result.train_loss,
               result.best_eval_loss ? fmt::format(", best eval loss {:.4f}", *result.best_eval_loss) : "",
               run_.train.output_dir.string(), format_duration(result.seconds));
    for (const auto& count : mixture_->counts()) {
      fmt::print("           {}: {} examples drawn, {} skipped, {} targets\n", count.name, count.drawn, count.skipped,
                 count.targets);
    }
    return 0;
  }

  void write_model() const {
    formats::ModelFolder folder;
    folder.config = config_;
    for (const auto& item : model_->named_parameters()) folder.tensors[item.key()] = item.value().detach();
    folder.dtype = dtype_;
    folder.tokenizer_json = renderer_->tokenizer().json();
    folder.tokenizer_config = renderer_->tokenizer().config();
    folder.chat_template = chat_template_;
    folder.generation_config = generation_config_;
    formats::write_model_folder(run_.train.output_dir, folder);
  }

  void write_model_card(const train::TrainResult& result) const {
    std::string card = fmt::format("---\nlibrary_name: moesaic\nbase_model: {}\ntags: [{}]\n---\n\n",
                                   Json(run_.model_name_or_path).dump(), run_.finetuning_type);
    card += fmt::format("# {} of {}\n\n", run_.finetuning_type, run_.model_name_or_path);
    card +=
        fmt::format("Trained by moesaic {} for {} steps on {} tokens; mean training loss {:.4f}{}.\n\n", kVersion,
                    result.steps, result.tokens, result.train_loss,
                    result.best_eval_loss ? fmt::format(", best evaluation loss {:.4f}", *result.best_eval_loss) : "");
    card += "| data | rows | examples drawn | rate |\n|---|---|---|---|\n";
    for (const auto& count : mixture_->counts()) {
      card += fmt::format("| {} | {} | {} | {:.3f} |\n", count.name, count.rows, count.drawn, count.rate);
    }
    card += "\nEvery setting stands in `run.yaml`.";
    if (composed()) {
      card +=
          fmt::format(" Use it with\n\n    moesaic generate --model {} -p \"...\"\n", run_.train.output_dir.string());
    } else if (!full()) {
      card += fmt::format(" Use it with\n\n    moesaic generate --model {} --adapter {} -p \"...\"\n",
                          run_.model_name_or_path, run_.train.output_dir.string());
    } else {
      card += "\n";
    }
    write_file_atomically(run_.train.output_dir / "README.md", card);
  }

  TrainOptions options_;
  train::RunConfig run_;
  torch::Device device_;
  torch::ScalarType dtype_;
  std::shared_ptr<formats::Checkpoint> checkpoint_;  // while the model is built
  Json config_, generation_config_;
  std::optional<std::string> chat_template_;
  std::string tokenizer_origin_;  // of a model from nothing with another tokenizer than its folder's
  std::shared_ptr<compose::Composition> composition_;  // finetuning_type calm; model_ is then its anchor
  std::shared_ptr<models::CausalLM> model_;
  std::unique_ptr<adapters::Adapter> adapter_;  // after the model: it detaches first
  std::shared_ptr<data::Renderer> renderer_;
  std::unique_ptr<data::Mixture> mixture_;
  std::vector<data::Example> eval_examples_;
  std::vector<eval::Task> tasks_;  // of the `eval` key
  int64_t base_parameters_ = 0;
};

}  // namespace

Runner add_train(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<TrainOptions>();
  app.add_option("run", options->run, "Run file (YAML)")->required();
  app.add_option("overrides", options->overrides, "key=value: sets a key of the run file");
  app.add_option("--resume", options->resume, "auto, none or a checkpoint folder; replaces resume_from_checkpoint");
  app.add_flag("--dry-run", options->dry_run, "Say what would be trained and the memory it needs, then stop");
  return [options, &app, &common] {
    Json config = read_yaml(options->run);
    apply_overrides(config, options->overrides);
    // The common flags win over the run file where they were given.
    if (app.count("--seed") > 0) config["seed"] = common.seed;
    if (app.count("--device") > 0) config["device"] = common.device;
    if (!options->resume.empty()) config["resume_from_checkpoint"] = options->resume;
    train::RunConfig run = train::parse_run_config(config, options->run);
    if (app.count("--dtype") > 0) run.dtype = common.dtype;
    return TrainCommand(*options, std::move(run)).execute();
  };
}

}  // namespace moesaic::cli
