// `moesaic demo calm`: two models made from nothing, one that knows keys and one that can calculate, and a composition
// that does what neither can.
#include <fmt/format.h>

#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/base/progress.h"
#include "moesaic/base/seed.h"
#include "moesaic/compose/folder.h"
#include "moesaic/data/key_arithmetic.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/generate/generate.h"
#include "moesaic/models/initialize.h"
#include "moesaic/train/trainer.h"

namespace moesaic::cli {
namespace {

struct CalmDemoOptions {
  std::string output_dir = "runs/calm";
  int64_t test_rows = 400;
  double fraction = 1.0;
  bool ablations = false;
  bool json = false;
};

constexpr std::pair<const char*, data::KeyTask> kTasks[] = {
    {"KV-SUB", data::KeyTask::kSubstitute}, {"NUM-MATH", data::KeyTask::kCalculate}, {"KV-MATH", data::KeyTask::kBoth}};

/// Fractions of right answers in the order of kTasks.
using Scores = std::vector<double>;

struct Row {
  std::string name;
  Scores scores;
  int64_t trained = 0;  // numbers
  double seconds = 0;
};

Json model_config() {
  return {{"model_type", "llama"},
          {"architectures", Json::array({"LlamaForCausalLM"})},
          {"vocab_size", data::kKeyVocabulary},
          {"hidden_size", 64},
          {"intermediate_size", 192},
          {"num_hidden_layers", 4},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 4},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-6},
          {"rope_theta", 10000.0},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", false},
          {"bos_token_id", data::key_bos_id()},
          {"eos_token_id", data::key_eos_id()}};
}

class CalmDemo {
 public:
  CalmDemo(const CalmDemoOptions& options, const CommonOptions& common)
      : options_(options), seed_(common.seed), folder_(options.output_dir), device_(parse_device(common.device)) {}

  /// Trains a model from nothing on texts of one kind and writes it to <output_dir>/<name>.
  Row make_model(const std::string& name, data::KeyText texts, int64_t steps, const std::string& title) {
    const auto config = models::parse_decoder_config(model_config(), name);
    models::CausalLM model(config, torch::dtype(torch::kFloat32).device(device_));
    models::initialize(model, derive_seed(seed_, name + " init"));
    data::KeyTexts stream({texts}, derive_seed(seed_, name + " texts"));
    const train::TrainConfig trainer = train_config(steps, 3e-3);
    Progress progress(title, trainer.max_steps);
    const auto result = train::train(model, nullptr, stream, {}, trainer, 0, show(progress));
    finish(progress, result);
    write(model, name);
    const compose::Member member = open(name);
    return {name, score(*member.model, *member.tokenizer), parameters_of(*member.model), result.seconds};
  }

  /// Joins `augmenting` to the anchor, trains the connections and writes them to <output_dir>/<name>.
  Row compose(const std::string& name, const std::string& augmenting, const compose::CompositionConfig& config) {
    const compose::Member anchor = open("anchor");
    compose::Composition composition(config, anchor, {open(augmenting)}, derive_seed(seed_, name + " init"));
    data::KeyTexts stream({data::KeyText::kComposed, data::KeyText::kArithmetic}, derive_seed(seed_, name + " texts"));
    const train::TrainConfig trainer = train_config(400, 4e-3);
    Progress progress("Training " + name, trainer.max_steps);
    const auto result = train::train(composition, stream, {}, trainer, 0, show(progress));
    finish(progress, result);
    compose::save_composition(composition, folder_ / name);
    return {name, score(composition, *anchor.tokenizer), parameters_of(composition), result.seconds};
  }

  /// A model of the same shape that was never trained.
  void make_random_model(const std::string& name) {
    models::CausalLM model(models::parse_decoder_config(model_config(), name), torch::dtype(torch::kFloat32));
    models::initialize(model, derive_seed(seed_, name + " init"));
    write(model, name);
  }

 private:
  void write(const models::CausalLM& model, const std::string& name) const {
    formats::ModelFolder folder;
    folder.config = model_config();
    for (const auto& item : model.named_parameters()) folder.tensors[item.key()] = item.value().detach().cpu();
    folder.tokenizer_json = data::key_tokenizer_json().dump();
    folder.tokenizer_config = data::key_tokenizer_config();
    formats::write_model_folder(folder_ / name, folder);
  }

  compose::Member open(const std::string& name) const {
    return compose::open_member(formats::Checkpoint::open(folder_ / name), {torch::kFloat32, device_, false});
  }

  static int64_t parameters_of(const torch::nn::Module& module) {
    int64_t count = 0;
    for (const auto& parameter : module.parameters()) count += parameter.numel();
    return count;
  }

  train::TrainConfig train_config(int64_t steps, double learning_rate) const {
    train::TrainConfig config;
    config.per_device_train_batch_size = 256;
    config.max_steps = std::max<int64_t>(1, std::llround(static_cast<double>(steps) * options_.fraction));
    config.learning_rate = learning_rate;
    config.lr_scheduler_type = "cosine";
    config.warmup_ratio = 0.05;
    config.weight_decay = 0.01;
    config.adam_beta2 = 0.98;
    config.save_steps = 0;
    config.seed = seed_;
    return config;
  }

  static std::function<void(const train::StepLog&)> show(Progress& progress) {
    return [&](const train::StepLog& log) {
      progress.update(log.step, fmt::format("loss {:.3f}, {:.0f} tokens/s", log.loss, log.tokens_per_second));
    };
  }

  static void finish(Progress& progress, const train::TrainResult& result) {
    progress.finish();
    if (result.interrupted) throw Error(ExitCode::kInterrupted, "interrupted; start the demo again to repeat it");
  }

  template <class Model>
  Scores score(Model& model, const tokenizer::Tokenizer& tokenizer) const {
    Scores scores;
    generate::SamplingOptions greedy;
    greedy.max_new_tokens = 12;
    greedy.eos_ids = {data::key_eos_id()};
    for (const auto& [name, task] : kTasks) {
      const auto questions = data::key_questions(task, options_.test_rows, seed_);
      std::vector<std::vector<int64_t>> prompts;
      for (const auto& question : questions) prompts.push_back(question.prompt);
      const auto answers = generate::generate(model, tokenizer, prompts, greedy);
      int64_t right = 0;
      for (size_t i = 0; i < questions.size(); ++i) right += key_answer_is_right(task, questions[i], answers[i].ids);
      scores.push_back(static_cast<double>(right) / static_cast<double>(questions.size()));
    }
    return scores;
  }

  CalmDemoOptions options_;
  uint64_t seed_;
  std::filesystem::path folder_;
  c10::Device device_;
};

Json results_json(const std::vector<Row>& rows, const CalmDemoOptions& options, uint64_t seed) {
  Json json{{"seed", seed}, {"test_rows", options.test_rows}, {"fraction", options.fraction}};
  for (const Row& row : rows) {
    for (size_t i = 0; i < std::size(kTasks); ++i) json["table"][row.name][kTasks[i].first] = row.scores[i];
    json["trained_parameters"][row.name] = row.trained;
    json["train_seconds"][row.name] = row.seconds;
  }
  return json;
}

void print_table(const std::vector<Row>& rows, int64_t questions) {
  fmt::print("\nRight answers to {} questions each, on keys the connections were never trained with:\n\n  {:<26}",
             questions, "");
  for (const auto& [name, task] : kTasks) fmt::print("{:>10}", name);
  fmt::print("{:>12}{:>10}\n", "trained", "time");
  for (const Row& row : rows) {
    fmt::print("  {:<26}", row.name);
    for (const double score : row.scores) fmt::print("{:>8.1f} %", 100 * score);
    fmt::print("{:>12}{:>10}\n", row.trained, format_duration(row.seconds));
  }
}

int run_calm_demo(const CalmDemoOptions& options, const CommonOptions& common) {
  if (!options.json) {
    fmt::print(
        "The augmenting model learns what 500 keys are worth, the anchor learns to add and subtract. Both are then\n"
        "frozen and joined by two cross-attentions, trained on 100 of the keys. All questions use the other 400.\n\n");
  }
  CalmDemo demo(options, common);
  std::vector<Row> rows;
  rows.push_back(demo.make_model("augmenting", data::KeyText::kSubstitution, 400, "Training the augmenting model"));
  rows.push_back(demo.make_model("anchor", data::KeyText::kArithmetic, 800, "Training the anchor"));
  compose::CompositionConfig config;
  config.connection.num_heads = 4;
  config.augmenting = {{compose::evenly_spaced(2, 4, 4)}};
  rows.push_back(demo.compose("composition", "augmenting", config));
  if (options.ablations) {
    demo.make_random_model("random");
    rows.push_back(demo.compose("random augmenting model", "random", config));
    compose::CompositionConfig prefix = config, unplaced = config, last = config;
    prefix.augmenting[0].mask = "prefix";
    rows.push_back(demo.compose("prompt read once", "augmenting", prefix));
    unplaced.connection.cross_position = "none";
    rows.push_back(demo.compose("without positions", "augmenting", unplaced));
    last.augmenting[0].connections = {{3, 3}};
    rows.push_back(demo.compose("last blocks only", "augmenting", last));
  }
  const Json results = results_json(rows, options, common.seed);
  const std::filesystem::path folder = options.output_dir;
  write_file_atomically(folder / "results.json", results.dump(2) + "\n");
  if (options.json) {
    fmt::print("{}\n", results.dump(2));
    return 0;
  }
  print_table(rows, options.test_rows);
  fmt::print("\nWritten: {0}/results.json, the models {0}/augmenting and {0}/anchor, the connections {0}/composition\n",
             options.output_dir);
  return 0;
}

}  // namespace

Runner add_calm_demo(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<CalmDemoOptions>();
  app.add_option("--output_dir", options->output_dir, "Where models and results go")->capture_default_str();
  app.add_option("--test_rows", options->test_rows, "Questions per task")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--fraction", options->fraction, "Share of the training steps, for a quick look")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  app.add_flag("--ablations", options->ablations, "Also train compositions that lack something");
  app.add_flag("--json", options->json, "Print the results as JSON, and nothing else on standard output");
  return [options, &common] { return run_calm_demo(*options, common); };
}

}  // namespace moesaic::cli
