// A tiny random model, a stream of random examples, and one call that trains: what the trainer's tests share.
#pragma once
#include <random>

#include "moesaic/adapters/adapter.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/train/trainer.h"

namespace moesaic::train {

inline std::shared_ptr<models::CausalLM> tiny_model(uint64_t seed = 1) {
  models::DecoderConfig config;
  config.model_type = "llama";
  config.vocab_size = 53;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 4;
  config.tie_word_embeddings = true;
  auto model = std::make_shared<models::CausalLM>(config, torch::dtype(torch::kFloat32));
  torch::manual_seed(seed);
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    if (parameter.dim() == 1) {
      parameter.fill_(1.0);
    } else {
      parameter.normal_(0.0, 0.3);
    }
  }
  return model;
}

/// Example `index` of an endless or finite list: 3 to 12 random tokens, the later half targets.
inline data::Example example_at(int64_t index) {
  std::mt19937_64 random(static_cast<uint64_t>(index) * 977 + 5);
  data::Example example;
  const size_t length = 3 + random() % 10;
  for (size_t i = 0; i < length; ++i) {
    example.ids.push_back(static_cast<int64_t>(random() % 53));
    example.mask.push_back(i >= (length + 1) / 2);
  }
  example.end_prompts_by_mask();
  return example;
}

/// Examples 0, 1, 2, ... up to `size` (-1 = endless), repeating after `period` (0 = never).
class CountingStream : public data::ExampleStream {
 public:
  explicit CountingStream(int64_t size = -1, int64_t period = 0) : size_(size), period_(period) {}
  std::optional<data::Example> next() override {
    if (size_ >= 0 && position_ >= size_) return std::nullopt;
    const int64_t index = position_++;
    return example_at(period_ > 0 ? index % period_ : index);
  }
  Json state() const override { return {{"position", position_}}; }
  void set_state(const Json& state) override { position_ = state.at("position"); }

 private:
  int64_t size_, period_, position_ = 0;
};

inline std::vector<data::Example> examples(int64_t begin, int64_t end) {
  std::vector<data::Example> list;
  for (int64_t i = begin; i < end; ++i) list.push_back(example_at(i));
  return list;
}

inline adapters::AdapterConfig molora_config(double dropout = 0.0) {
  adapters::AdapterConfig config;
  config.method = "molora";
  config.num_experts = 3;
  config.lora_rank = 2;
  config.lora_dropout = dropout;
  config.targets = std::vector<std::string>{"q_proj", "v_proj", "up_proj", "down_proj"};
  return config;
}

/// One run on a fresh tiny model with a fresh adapter.
struct TinyRun {
  explicit TinyRun(adapters::AdapterConfig adapter_config = molora_config()) : model(tiny_model()) {
    adapter = adapters::Adapter::create(std::move(adapter_config), model->sites(), torch::kCPU, 11);
    model->attach("adapter", adapter);
    // B and the vectors start where gradients of the rest vanish: move everything a little.
    torch::manual_seed(2);
    torch::NoGradGuard no_grad;
    for (auto& parameter : adapter->parameters()) parameter.tensor.add_(torch::randn_like(parameter.tensor), 0.05);
  }

  TrainResult train(const TrainConfig& config, data::ExampleStream& stream,
                    const std::vector<data::Example>& eval_examples = {},
                    std::function<void(const StepLog&)> on_step = nullptr, int64_t epoch_size = 0,
                    const TaskEvaluation& evaluate_tasks = nullptr, const std::function<bool()>& stop = nullptr) {
    auto on_log = [&](const StepLog& log) {
      logs.push_back(log);
      if (on_step) on_step(log);
    };
    std::vector<EvalSet> eval_sets;
    if (!eval_examples.empty()) eval_sets.push_back({"held_out", eval_examples});
    return train::train(*model, *adapter, stream, eval_sets, config, epoch_size,
                        {on_log, evaluate_tasks, stop, nullptr});
  }

  /// All trained numbers in one row.
  torch::Tensor values() const {
    std::vector<torch::Tensor> flat;
    for (const auto& parameter : adapter->parameters()) flat.push_back(parameter.tensor.detach().flatten());
    return torch::cat(flat).clone();
  }

  std::shared_ptr<models::CausalLM> model;
  std::shared_ptr<adapters::Adapter> adapter;
  std::vector<StepLog> logs;
};

}  // namespace moesaic::train
