#include "cli/key_experiment.h"

#include "moesaic/base/progress.h"
#include "moesaic/base/seed.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/generate/generate.h"
#include "moesaic/models/initialize.h"

namespace moesaic::cli {
namespace {

const std::vector<data::KeyText> kComposedTexts{data::KeyText::kComposed, data::KeyText::kArithmetic};
constexpr int64_t kFurtherSteps = 400;  // of whatever is trained on top of trained models
constexpr double kFurtherLearningRate = 4e-3;

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

std::shared_ptr<models::CausalLM> new_model(const std::string& name, c10::Device device, uint64_t seed) {
  auto model = std::make_shared<models::CausalLM>(models::parse_decoder_config(model_config(), name),
                                                  torch::dtype(torch::kFloat32).device(device));
  models::initialize(*model, derive_seed(seed, name + " init"));
  return model;
}

int64_t parameters_of(const torch::nn::Module& module) {
  int64_t count = 0;
  for (const auto& parameter : module.parameters()) count += parameter.numel();
  return count;
}

std::unique_ptr<adapters::Adapter> make_lora(models::CausalLM& model, int64_t rank, uint64_t seed) {
  adapters::AdapterConfig config;
  config.method = "lora";
  config.lora_rank = rank;
  config.lora_alpha = 2.0 * static_cast<double>(rank);
  config = adapters::resolve_targets(config, "all-linear");
  return adapters::Adapter::create(config, model.sites(), model.device(), seed);
}

int64_t parameters_of(adapters::Adapter& adapter) {
  int64_t count = 0;
  for (const auto& parameter : adapter.parameters()) count += parameter.tensor.numel();
  return count;
}

}  // namespace

KeyRow KeyExperiment::make_model(const std::string& name, data::KeyText texts, int64_t steps) {
  const auto model = new_model(name, device_, seed_);
  const auto result = train(name, {texts}, steps, 3e-3, [&](auto&&... run) {
    return train::train(*model, nullptr, std::forward<decltype(run)>(run)...);
  });
  write(*model, name);
  const compose::Member member = open(name);
  return row(name, *member.model, *member.tokenizer, parameters_of(*model), result.seconds);
}

void KeyExperiment::make_random_model(const std::string& name) { write(*new_model(name, device_, seed_), name); }

KeyRow KeyExperiment::compose(const std::string& name, const std::string& anchor, const std::string& augmenting,
                              const compose::CompositionConfig& config) {
  const compose::Member member = open(anchor);
  compose::Composition composition(config, member, {open(augmenting)}, derive_seed(seed_, name + " init"));
  const auto result = train(name, kComposedTexts, kFurtherSteps, kFurtherLearningRate, [&](auto&&... run) {
    return train::train(composition, std::forward<decltype(run)>(run)...);
  });
  compose::save_composition(composition, folder_ / name);
  return row(name, composition, *member.tokenizer, parameters_of(composition), result.seconds);
}

KeyRow KeyExperiment::adapt(const std::string& name, const std::string& model, int64_t parameters) {
  const compose::Member member = open(model);
  const uint64_t seed = derive_seed(seed_, name + " init");
  const int64_t of_rank_one = parameters_of(*make_lora(*member.model, 1, seed));
  const int64_t rank = std::max<int64_t>(1, (parameters + of_rank_one / 2) / of_rank_one);
  const auto adapter = make_lora(*member.model, rank, seed);
  const auto result = train(name, kComposedTexts, kFurtherSteps, kFurtherLearningRate, [&](auto&&... run) {
    return train::train(*member.model, adapter.get(), std::forward<decltype(run)>(run)...);
  });
  adapter->save(folder_ / name);
  return row(name, *member.model, *member.tokenizer, parameters_of(*adapter), result.seconds);
}

KeyRow KeyExperiment::tune(const std::string& name, const std::string& model, data::KeyText texts) {
  const compose::Member member = open(model);
  const auto result = train(name, {texts}, kFurtherSteps, 3e-3, [&](auto&&... run) {
    return train::train(*member.model, nullptr, std::forward<decltype(run)>(run)...);
  });
  write(*member.model, name);
  return row(name, *member.model, *member.tokenizer, parameters_of(*member.model), result.seconds);
}

void KeyExperiment::write(const models::CausalLM& model, const std::string& name) const {
  formats::ModelFolder folder;
  folder.config = model_config();
  for (const auto& item : model.named_parameters()) folder.tensors[item.key()] = item.value().detach().cpu();
  folder.tokenizer_json = data::key_tokenizer_json().dump();
  folder.tokenizer_config = data::key_tokenizer_config();
  formats::write_model_folder(folder_ / name, folder);
}

compose::Member KeyExperiment::open(const std::string& name) const {
  return compose::open_member(formats::Checkpoint::open(folder_ / name), {torch::kFloat32, device_, false});
}

template <class Run>
train::TrainResult KeyExperiment::train(const std::string& name, const std::vector<data::KeyText>& texts, int64_t steps,
                                        double learning_rate, const Run& run) const {
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
  data::KeyTexts stream(texts, derive_seed(seed_, name + " texts"));
  Progress progress("Training: " + name, config.max_steps);
  const std::function<void(const train::StepLog&)> show = [&](const train::StepLog& log) {
    progress.update(log.step, fmt::format("loss {:.3f}, {:.0f} tokens/s", log.loss, log.tokens_per_second));
  };
  const train::TrainResult result = run(stream, std::vector<data::Example>{}, config, /*epoch_size=*/0, show);
  progress.finish();
  if (result.interrupted) throw Error(ExitCode::kInterrupted, "interrupted; start the demo again to repeat it");
  return result;
}

template <class Model>
KeyRow KeyExperiment::row(const std::string& name, Model& model, const tokenizer::Tokenizer& tokenizer, int64_t trained,
                          double seconds) const {
  KeyRow row{name, {}, trained, seconds};
  generate::SamplingOptions greedy;
  greedy.max_new_tokens = 12;
  greedy.eos_ids = {data::key_eos_id()};
  for (const auto& [task_name, task] : kKeyTasks) {
    const auto questions = data::key_questions(task, test_rows_, seed_);
    std::vector<std::vector<int64_t>> prompts;
    for (const auto& question : questions) prompts.push_back(question.prompt);
    const auto answers = generate::generate(model, tokenizer, prompts, greedy);
    int64_t right = 0;
    for (size_t i = 0; i < questions.size(); ++i)
      right += data::key_answer_is_right(task, questions[i], answers[i].ids);
    row.scores.push_back(static_cast<double>(right) / static_cast<double>(questions.size()));
  }
  return row;
}

}  // namespace moesaic::cli
