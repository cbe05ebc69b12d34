#include "demos/key_experiment.h"

#include "moesaic/base/count_numbers.h"
#include "moesaic/base/progress.h"
#include "moesaic/base/seed.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/generate/generate.h"
#include "moesaic/models/initialize.h"
#include "moesaic/models/registry.h"

namespace moesaic::demos {
namespace {

const std::vector<KeyText> kComposedTexts{KeyText::kComposed, KeyText::kArithmetic};
constexpr int64_t kFurtherSteps = 1000;  // of whatever is trained on top of trained models
constexpr double kFurtherLearningRate = 4e-3;

Json model_config() {
  return {
      {"model_type", "llama"},         {"architectures", Json::array({"LlamaForCausalLM"})},
      {"vocab_size", kKeyVocabulary},  {"hidden_size", 64},
      {"intermediate_size", 192},      {"num_hidden_layers", 4},
      {"num_attention_heads", 4},      {"num_key_value_heads", 4},
      {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-6},
      {"rope_theta", 10000.0},         {"hidden_act", "silu"},
      {"tie_word_embeddings", false},  {"bos_token_id", key_bos_id()},
      {"eos_token_id", key_eos_id()},
  };
}

std::shared_ptr<models::CausalLM> new_model(const std::string& name, c10::Device device, uint64_t seed) {
  auto model = std::make_shared<models::CausalLM>(models::parse_decoder_config(model_config(), name),
                                                  torch::dtype(torch::kFloat32).device(device));
  models::initialize(*model, derive_seed(seed, name + " init"));
  return model;
}

std::shared_ptr<adapters::Adapter> make_lora(models::SingleModel& model, int64_t rank, uint64_t seed) {
  adapters::AdapterConfig config;
  config.method = "lora";
  config.lora_rank = rank;
  config.lora_alpha = 2.0 * static_cast<double>(rank);
  config = adapters::resolve_targets(config, "all-linear", model.sites());
  return adapters::Adapter::create(config, model.sites(), model.device(), seed);
}

}  // namespace

KeyRow KeyExperiment::make_model(const std::string& name, KeyText texts, int64_t steps) {
  const auto model = new_model(name, device_, seed_);
  models::AllWeights all(model, folder_of());
  const auto result = train(name, *model, all, {texts}, steps, 3e-3);
  const compose::Member member = open(name);
  return row(name, *member.model, *member.tokenizer, count_numbers(all.parameters()), result.seconds);
}

void KeyExperiment::make_random_model(const std::string& name) {
  models::AllWeights(new_model(name, device_, seed_), folder_of()).save(folder_ / name);
}

KeyRow KeyExperiment::compose(const std::string& name, const std::string& anchor, const std::string& augmenting,
                              const compose::CompositionConfig& config) {
  const compose::Member member = open(anchor);
  const auto composition = std::make_shared<compose::Composition>(config, member, std::vector{open(augmenting)},
                                                                  derive_seed(seed_, name + " init"));
  int64_t trained = 0;
  double seconds = 0;
  {
    compose::Connections connections(composition, /*train_adapters=*/false);
    trained = count_numbers(connections.parameters());
    seconds = train(name, *composition, connections, kComposedTexts, kFurtherSteps, kFurtherLearningRate).seconds;
  }
  return row(name, *composition, *member.tokenizer, trained, seconds);
}

KeyRow KeyExperiment::adapt(const std::string& name, const std::string& model, int64_t parameters) {
  const compose::Member member = open(model);
  const uint64_t seed = derive_seed(seed_, name + " init");
  const int64_t of_rank_one = count_numbers(make_lora(*member.model, 1, seed)->parameters());
  const int64_t rank = std::max<int64_t>(1, (parameters + of_rank_one / 2) / of_rank_one);
  const auto adapter = make_lora(*member.model, rank, seed);
  member.model->attach(name, adapter);
  const auto result = train(name, *member.model, *adapter, kComposedTexts, kFurtherSteps, kFurtherLearningRate);
  return row(name, *member.model, *member.tokenizer, count_numbers(adapter->parameters()), result.seconds);
}

KeyRow KeyExperiment::tune(const std::string& name, const std::string& model, KeyText texts) {
  const compose::Member member = open(model);
  models::AllWeights all(member.model, folder_of());
  const auto result = train(name, *member.model, all, {texts}, kFurtherSteps, 3e-3);
  return row(name, *member.model, *member.tokenizer, count_numbers(all.parameters()), result.seconds);
}

formats::ModelFolder KeyExperiment::folder_of() const {
  formats::ModelFolder folder;
  folder.config = model_config();
  folder.tokenizer.json = key_tokenizer_json().dump();
  folder.tokenizer.config = key_tokenizer_config();
  return folder;
}

compose::Member KeyExperiment::open(const std::string& name) const {
  return compose::open_member(models::open_checkpoint(folder_ / name), {torch::kFloat32, device_, false});
}

train::TrainResult KeyExperiment::train(const std::string& name, models::LanguageModel& model, nn::Learner& learner,
                                        const std::vector<KeyText>& texts, int64_t steps, double learning_rate) const {
  train::TrainConfig config;
  config.per_device_train_batch_size = 256;
  config.max_steps = std::max<int64_t>(1, std::llround(static_cast<double>(steps) * fraction_));
  config.learning_rate = learning_rate;
  config.lr_scheduler_type = "cosine";
  config.warmup_ratio = 0.05;
  config.weight_decay = 0.01;
  config.adam_beta2 = 0.98;
  config.save_steps = 0;
  config.seed = seed_;
  KeyTexts stream(texts, derive_seed(seed_, name + " texts"));
  Progress progress("Training: " + name, config.max_steps);
  train::TrainHooks hooks;
  hooks.on_log = [&](const train::StepLog& log) {
    progress.update(log.step, fmt::format("loss {:.3f}, {:.0f} tokens/s", log.loss, log.tokens_per_second));
  };
  const train::TrainResult result = train::train(model, learner, stream, {}, config, /*epoch_size=*/0, hooks);
  progress.finish();
  learner.save(folder_ / name);
  return result;
}

KeyRow KeyExperiment::row(const std::string& name, models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer,
                          int64_t trained, double seconds) const {
  KeyRow row{name, {}, trained, seconds};
  generate::SamplingOptions greedy;
  greedy.max_new_tokens = 12;
  greedy.eos_ids = {key_eos_id()};
  for (const auto& [task_name, task] : kKeyTasks) {
    const auto questions = key_questions(task, test_rows_, seed_);
    std::vector<generate::Prompt> prompts;
    for (const auto& question : questions) prompts.push_back({question.prompt});
    const auto answers = generate::generate(model, tokenizer, prompts, greedy);
    int64_t right = 0;
    for (size_t i = 0; i < questions.size(); ++i) right += key_answer_is_right(task, questions[i], answers[i].ids);
    row.scores.push_back(static_cast<double>(right) / static_cast<double>(questions.size()));
  }
  return row;
}

}  // namespace moesaic::demos
