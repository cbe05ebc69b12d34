// `moesaic demo`: the main job on a real model, from the base's score to experts that do the skills, in one go.
#include <fmt/format.h>

#include "cli/command.h"
#include "demos/greedy_match.h"
#include "demos/skills.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/base/count_numbers.h"
#include "moesaic/base/device.h"
#include "moesaic/base/progress.h"
#include "moesaic/data/dataset.h"
#include "moesaic/eval/routes.h"
#include "moesaic/formats/checkpoint.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "moesaic/train/trainer.h"

namespace moesaic::cli {
namespace {

struct DemoOptions {
  std::string model = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  std::string output_dir = "runs/demo";
  int64_t steps = 200;
  int64_t batch_size = 8;
  int64_t test_rows = demos::kTestRows;
  bool compare = false;
  bool json = false;
};

constexpr int64_t kRoutedRows = 10;  // test instances per skill behind the routing page

/// Percent of unseen instances answered exactly, per skill in the order of demos::skills().
using Scores = std::vector<double>;

struct Run {
  std::string method;
  int64_t trainable = 0;
  double seconds = 0, loss = 0;
  Scores scores;
};

class Demo {
 public:
  Demo(const DemoOptions& options, const CommonOptions& common)
      : options_(options), common_(common), folder_(options.output_dir), device_(parse_device(common.device)) {
    MOESAIC_CHECK(std::filesystem::exists(options.model), UsageError,
                  "--model {}: no such file. `make demo` fetches it; any folder with config.json or GGUF file will do.",
                  options.model);
    checkpoint_ = models::open_checkpoint(options.model);
    const NumberFormat format = number_format(common.dtype, device_);
    model_ = models::CausalLM::load(*checkpoint_, {format.dtype, device_, false});
    say("Computing in {} on {}: {}.\n\n", dtype_name(format.dtype), device_.str(), format.reason);
    renderer_ = data::Renderer::open(*checkpoint_, {});
    demos::write_skills(folder_ / "data", demos::kTrainRows, options.test_rows, common.seed);
    for (const demos::Skill& skill : demos::skills()) {
      tests_.push_back(data::load_examples(data::resolve_datasets(skill.name + "_test", folder_ / "data"), *renderer_));
      if (!skill.held_out) trained_.push_back(skill.name);
    }
  }

  Scores evaluate(const std::string& title) {
    std::vector<data::Example> all;
    for (const auto& examples : tests_) all.insert(all.end(), examples.begin(), examples.end());
    Progress progress(title, static_cast<int64_t>(all.size()));
    const std::vector<uint8_t> matches =
        demos::greedy_matches(*model_, all, 2048, [&](int64_t done) { progress.update(done); });
    progress.finish();
    Scores scores;
    auto it = matches.begin();
    for (const auto& examples : tests_) {
      scores.push_back(100.0 * std::accumulate(it, it + examples.size(), 0) / examples.size());
      it += static_cast<int64_t>(examples.size());
    }
    return scores;
  }

  Run train(const std::string& method, int64_t rank) {
    adapters::AdapterConfig config;
    config.method = method;
    const adapters::Method& kind = adapters::method_of(method);
    config.num_experts = kind.mixes ? 8 : 1;
    config.lora_rank = rank;
    config.base_model_name_or_path = options_.model;
    config.base_fingerprint = checkpoint_->fingerprint();
    config.base_dtype = dtype_name(model_->dtype());
    config = adapters::resolve_targets(config, "", model_->sites());
    const auto adapter = adapters::Adapter::create(config, model_->sites(), device_, common_.seed);

    Run run;
    run.method = method;
    run.trainable = count_numbers(adapter->parameters());
    data::Mixture mixture(data::resolve_datasets(trained_, folder_ / "data"), renderer_, common_.seed, "proportional");
    train::TrainConfig trainer;
    trainer.output_dir = folder_ / method;
    trainer.per_device_train_batch_size = options_.batch_size;
    // Vectors start at one and move less per step than matrices that start at zero.
    trainer.learning_rate = kind.low_rank ? 1e-3 : 1e-2;
    trainer.max_steps = options_.steps;
    trainer.save_steps = 0;
    trainer.overwrite_output_dir = true;
    trainer.seed = common_.seed;
    Progress progress("Training " + method, options_.steps);
    train::TrainHooks hooks;
    hooks.on_log = [&](const train::StepLog& log) {
      progress.update(log.step, fmt::format("loss {:.3f}, {:.0f} tokens/s", log.loss, log.tokens_per_second));
    };
    const train::TrainResult result =
        train::train(*model_, *adapter, mixture, {}, trainer, mixture.epoch_size(), hooks);
    progress.finish();
    run.seconds = result.seconds;
    run.loss = result.train_loss;
    run.scores = evaluate("Testing " + method);
    if (kind.mixes && kind.low_rank) write_routes();
    return run;
  }

  /// The rank at which LoRA trains about as many numbers as MoLoRA with 8 experts of rank 4.
  int64_t lora_rank_for(int64_t trainable) {
    int64_t per_rank = 0;
    for (const nn::LinearSite& site : model_->sites().linears) per_rank += site.in + site.out;
    return std::max<int64_t>(1, (trainable + per_rank / 2) / per_rank);
  }

  const std::filesystem::path& folder() const { return folder_; }

 private:
  /// routes.json and routes.html: what the attached adapter's routers do on the test instances, as `moesaic routes`.
  void write_routes() {
    const tokenizer::Tokenizer& tokenizer = renderer_->tokenizer();
    const auto chat = tokenizer::ChatTemplate::open(*checkpoint_, tokenizer);
    const eval::EvalModel model{*model_, tokenizer, chat.get()};
    eval::EvalOptions options;
    options.apply_chat_template = chat != nullptr;
    std::vector<std::string> files;
    for (const demos::Skill& skill : demos::skills())
      files.push_back((folder_ / "data" / (skill.name + ".test.jsonl")).string());
    std::vector<eval::TaskRoutes> routings;
    Progress progress("Watching the routers", static_cast<int64_t>(files.size()));
    for (const eval::Task& task : eval::load_tasks(files, {.limit = kRoutedRows})) {
      routings.push_back(eval::route_task(model, task, options));
      progress.update(static_cast<int64_t>(routings.size()));
    }
    progress.finish();
    const eval::TextRoutes text = eval::route_text(model, tests_.front().front().ids);
    const OrderedJson routes = eval::routes_json(options_.model, *model_, routings, &text);
    write_file_atomically(folder_ / "routes.json",
                          routes.dump(1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
    write_file_atomically(folder_ / "routes.html", eval::routes_html(routes));
  }

  DemoOptions options_;
  CommonOptions common_;
  std::filesystem::path folder_;
  c10::Device device_;
  std::shared_ptr<formats::Checkpoint> checkpoint_;
  std::shared_ptr<models::CausalLM> model_;
  std::shared_ptr<data::Renderer> renderer_;
  std::vector<std::vector<data::Example>> tests_;  // per skill
  std::vector<std::string> trained_;
};

double mean_of(const Scores& scores, bool held_out) {
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (demos::skills()[i].held_out != held_out) continue;
    sum += scores[i];
    ++count;
  }
  return sum / std::max<int64_t>(count, 1);
}

void print_table(const Scores& base, const std::vector<Run>& runs) {
  auto line = [&](const std::string& name, const std::string& before, const std::vector<std::string>& after) {
    say("  {:<24}{:>8}", name, before);
    for (const std::string& cell : after) say("{:>10}", cell);
    say("\n");
  };
  auto percent = [](double value) { return fmt::format("{:.0f} %", value); };
  auto row = [&](const std::string& name, const std::function<double(const Scores&)>& of) {
    std::vector<std::string> after;
    for (const Run& run : runs) after.push_back(percent(of(run.scores)));
    line(name, percent(of(base)), after);
  };
  std::vector<std::string> methods, trainable, seconds;
  for (const Run& run : runs) {
    methods.push_back(run.method);
    trainable.push_back(format_count(static_cast<double>(run.trainable)));
    seconds.push_back(format_duration(run.seconds));
  }
  say("\nAnswers that are exactly right, on instances never seen in training:\n\n");
  line("skill", "base", methods);
  for (bool held_out : {false, true}) {
    if (held_out) say("  never trained, of related kind:\n");
    for (size_t i = 0; i < base.size(); ++i) {
      if (demos::skills()[i].held_out == held_out) {
        row((held_out ? "  " : "") + demos::skills()[i].name, [i](const Scores& scores) { return scores[i]; });
      }
    }
  }
  row("mean, trained skills", [](const Scores& scores) { return mean_of(scores, false); });
  row("mean, never trained", [](const Scores& scores) { return mean_of(scores, true); });
  line("trained numbers", "0", trainable);
  line("training time", "-", seconds);
}

Json results_json(const Scores& base, const std::vector<Run>& runs) {
  auto scores = [](const Scores& values) {
    Json json;
    for (size_t i = 0; i < values.size(); ++i) json["skills"][demos::skills()[i].name] = values[i] / 100;
    json["mean_trained"] = mean_of(values, false) / 100;
    json["mean_held_out"] = mean_of(values, true) / 100;
    return json;
  };
  Json json{{"base", scores(base)}};
  for (const Run& run : runs) {
    json[run.method] = scores(run.scores);
    json[run.method]["trainable_parameters"] = run.trainable;
    json[run.method]["train_seconds"] = run.seconds;
    json[run.method]["train_loss"] = run.loss;
  }
  return json;
}

int run_demo(const DemoOptions& options, const CommonOptions& common) {
  const FolderLock lock = take_demo_folder(options.output_dir, options.model);
  say("Growing a mixture of experts inside {}\n"
      "The model stays frozen; {} MoLoRA experts of rank 4 sit beside each of its linears, with a router each.\n\n",
      std::filesystem::path(options.model).filename().string(), 8);
  Demo demo(options, common);
  const Scores base = demo.evaluate("Testing the base model");
  std::vector<Run> runs{demo.train("molora", 4)};
  if (options.compare) {
    runs.push_back(demo.train("lora", demo.lora_rank_for(runs[0].trainable)));
    runs.push_back(demo.train("ia3", 1));
    runs.push_back(demo.train("mov", 1));
  }
  print_table(base, runs);

  const Json results = results_json(base, runs);
  write_file_atomically(demo.folder() / "results.json", results.dump(2) + "\n");
  if (options.json) say("{}\n", results.dump(2));
  say("\nWritten: {0}/results.json, the adapter in {0}/molora, and which expert does what in {0}/routes.html\n\n"
      "Next:\n"
      "  build/moesaic chat --model {1} --adapter {0}/molora\n"
      "  build/moesaic inspect {0}/molora\n"
      "  build/moesaic train recipes/molora_smollm2.yaml dataset_dir={0}/data output_dir=runs/mine max_steps=20\n",
      options.output_dir, options.model);
  return 0;
}

}  // namespace

FolderLock take_demo_folder(const std::filesystem::path& dir, const std::filesystem::path& model) {
  check_new_folder(dir, {model});
  MOESAIC_CHECK(!std::filesystem::exists(dir / "results.json"), UsageError,
                "--output_dir {}: got a folder with the results of an earlier demo, expected another one: nothing is "
                "overwritten\nhint: make demo ARGS=\"--output_dir runs/another\"",
                dir.string());
  return FolderLock(dir);
}

Runner add_demo(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<DemoOptions>();
  app.add_option("--model", options->model, "Base model: GGUF file or Hugging Face folder")->capture_default_str();
  app.add_option("--output_dir", options->output_dir, "Where data, adapters and results go")->capture_default_str();
  app.add_option("--steps", options->steps, "Training steps")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--batch_size", options->batch_size, "Examples per step")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--test_rows", options->test_rows, "Test instances per skill")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_flag("--compare", options->compare, "Also train LoRA of the same size, (IA)^3 and MoV");
  app.add_flag("--json", options->json, "Also print the results as JSON");
  CLI::App* calm = app.add_subcommand("calm", "Compose two small models made from nothing, by cross-attention");
  calm->fallthrough();  // the common flags may follow
  const Runner run_calm = add_calm_demo(*calm, common);
  return [options, calm, run_calm, &common] { return calm->parsed() ? run_calm() : run_demo(*options, common); };
}

}  // namespace moesaic::cli
