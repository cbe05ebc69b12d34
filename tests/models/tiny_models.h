// Tiny random models of every family.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "moesaic/models/seq2seq_lm.h"

namespace moesaic::test {

/// A few KB of config.json per family, with odd sizes, GQA, MQA, tied and untied heads, windows and rope scalings.
inline std::vector<std::pair<std::string, Json>> tiny_configs() {
  auto with = [](Json config, const Json& changes) {
    config.update(changes);
    return config;
  };
  const Json base{
      {"vocab_size", 53},         {"hidden_size", 24},        {"intermediate_size", 37},      {"num_hidden_layers", 2},
      {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 64}};
  return {
      {"llama", with(base, {{"model_type", "llama"}})},
      {"llama mqa, biases, tied", with(base, {{"model_type", "llama"},
                                              {"num_key_value_heads", 1},
                                              {"attention_bias", true},
                                              {"mlp_bias", true},
                                              {"tie_word_embeddings", true}})},
      {"llama yarn",
       with(base,
            {{"model_type", "llama"},
             {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 16}}}})},
      {"mistral", with(base, {{"model_type", "mistral"}, {"sliding_window", 4}})},
      {"qwen2", with(base, {{"model_type", "qwen2"},
                            {"use_sliding_window", true},
                            {"sliding_window", 3},
                            {"max_window_layers", 1},
                            {"tie_word_embeddings", true}})},
      {"qwen3", with(base, {{"model_type", "qwen3"}, {"head_dim", 10}})},
      {"gemma", with(base, {{"model_type", "gemma"}, {"head_dim", 8}})},
      {"gemma2", with(base, {{"model_type", "gemma2"},
                             {"head_dim", 8},
                             {"sliding_window", 4},
                             {"query_pre_attn_scalar", 12},
                             {"attn_logit_softcapping", 6.0},
                             {"final_logit_softcapping", 4.0}})},
      {"gemma3", with(base, {{"model_type", "gemma3_text"},
                             {"head_dim", 8},
                             {"sliding_window", 4},
                             {"sliding_window_pattern", 2},
                             {"query_pre_attn_scalar", 12},
                             {"attn_logit_softcapping", 6.0},
                             {"final_logit_softcapping", 4.0}})},
      {"mixtral", with(base, {{"model_type", "mixtral"}, {"num_local_experts", 3}, {"sliding_window", 4}})},
      {"qwen2_moe", with(base, {{"model_type", "qwen2_moe"},
                                {"num_experts", 4},
                                {"num_experts_per_tok", 3},
                                {"moe_intermediate_size", 11},
                                {"shared_expert_intermediate_size", 15},
                                {"mlp_only_layers", {0}}})},
      {"qwen3_moe", with(base, {{"model_type", "qwen3_moe"},
                                {"head_dim", 10},
                                {"num_local_experts", 4},
                                {"num_experts_per_tok", 2},
                                {"moe_intermediate_size", 11},
                                {"norm_topk_prob", true}})},
      {"olmoe",
       with(base, {{"model_type", "olmoe"}, {"num_experts", 3}, {"num_experts_per_tok", 2}, {"clip_qkv", 0.5}})},
      {"granitemoe", with(base, {{"model_type", "granitemoe"},
                                 {"num_local_experts", 4},
                                 {"num_experts_per_tok", 2},
                                 {"embedding_multiplier", 3.0},
                                 {"attention_multiplier", 0.25},
                                 {"residual_multiplier", 0.5},
                                 {"logits_scaling", 2.0}})},
      {"granitemoeshared", with(base, {{"model_type", "granitemoeshared"},
                                       {"num_local_experts", 3},
                                       {"num_experts_per_tok", 2},
                                       {"shared_intermediate_size", 13}})},
  };
}

/// The same for encoder-decoders, whose relative distances pass the exact buckets and the largest one.
inline std::vector<std::pair<std::string, Json>> tiny_seq2seq_configs() {
  auto with = [](const Json& changes) {
    Json config{{"vocab_size", 53},
                {"is_encoder_decoder", true},
                {"d_model", 24},
                {"d_ff", 37},
                {"d_kv", 10},
                {"num_layers", 2},
                {"num_heads", 3},
                {"relative_attention_num_buckets", 8},
                {"relative_attention_max_distance", 6}};
    config.update(changes);
    return config;
  };
  auto half = [](const Json& changes) {
    Json config{{"vocab_size", 53},
                {"hidden_size", 24},
                {"intermediate_size", 37},
                {"num_hidden_layers", 2},
                {"num_attention_heads", 4},
                {"num_key_value_heads", 1},
                {"head_dim", 8},
                {"sliding_window", 3},
                {"query_pre_attn_scalar", 12},
                {"final_logit_softcapping", 4.0}};
    config.update(changes);
    return config;
  };
  return {
      {"t5", with({{"model_type", "t5"}, {"num_decoder_layers", 3}})},
      {"t5 1.1", with({{"model_type", "t5"}, {"feed_forward_proj", "gated-gelu"}, {"tie_word_embeddings", false}})},
      {"mt5", with({{"model_type", "mt5"}, {"decoder_start_token_id", 3}})},
      {"umt5", with({{"model_type", "umt5"}})},
      // Experts that are full before a text of a few tokens ends.
      {"switch", with({{"model_type", "switch_transformers"},
                       {"num_decoder_layers", 3},
                       {"num_sparse_encoder_layers", 1},
                       {"num_sparse_decoder_layers", 3},
                       {"num_experts", 3},
                       {"expert_capacity", 2}})},
      {"t5gemma",
       {{"model_type", "t5gemma"},
        {"is_encoder_decoder", true},
        {"encoder", half({{"num_key_value_heads", 2}, {"attn_logit_softcapping", nullptr}})},
        {"decoder", half({{"num_hidden_layers", 3}, {"head_dim", 10}, {"attn_logit_softcapping", 6.0}})}}},
      // Windows of either side and of one, shorter than the texts; a token with an embedding of its own.
      {"t5gemma2",
       {{"model_type", "t5gemma2"},
        {"is_encoder_decoder", true},
        {"encoder",
         {{"text_config", half({{"num_key_value_heads", 2}, {"sliding_window", 4}, {"sliding_window_pattern", 2}})},
          {"eoi_token_index", 9}}},
        {"decoder", half({{"num_key_value_heads", 2}, {"num_hidden_layers", 3}, {"sliding_window_pattern", 2}})}}},
  };
}

/// A model with random weights: matrices ~ N(0, 0.3), norms around their neutral value.
inline std::shared_ptr<models::CausalLM> random_model(const Json& config, torch::Dtype dtype = torch::kFloat32,
                                                      uint64_t seed = 0) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(seed);
  const auto parsed = models::parse_decoder_config(config, "config.json");
  auto model = std::make_shared<models::CausalLM>(parsed, torch::TensorOptions(dtype));
  for (auto& item : model->named_parameters()) {
    const bool norm = item.key().find("norm") != std::string::npos;
    const double centre = norm && !parsed.norm_plus_one ? 1.0 : 0.0;
    item.value().copy_(torch::randn(item.value().sizes(), torch::kFloat64) * 0.3 + centre);
  }
  return model;
}

/// An encoder-decoder with random weights.
inline std::shared_ptr<models::Seq2SeqLM> random_seq2seq(const Json& config, torch::Dtype dtype = torch::kFloat32,
                                                         uint64_t seed = 0) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(seed);
  auto model = std::dynamic_pointer_cast<models::Seq2SeqLM>(models::make_model(config, "config.json", dtype));
  for (auto& item : model->named_parameters()) {
    const double centre = item.value().dim() == 1 && !model->config().halves ? 1.0 : 0.0;
    item.value().copy_(torch::randn(item.value().sizes(), torch::kFloat64) * 0.3 + centre);
  }
  return model;
}

inline torch::Tensor logits_of(models::LanguageModel& model, const std::vector<std::vector<int64_t>>& sequences,
                               models::Memory* memory = nullptr) {
  nn::Pass pass;
  return model.head().logits(model.hidden({nn::RaggedBatch::from_sequences(sequences)}, pass, memory));
}

/// Tensors in memory, as a checkpoint.
class MemoryCheckpoint : public formats::Checkpoint {
 public:
  MemoryCheckpoint(Json config, std::map<std::string, torch::Tensor> tensors) : tensors(std::move(tensors)) {
    path_ = "memory";
    config_ = std::move(config);
  }
  /// The weights of `model` under `config`.
  MemoryCheckpoint(Json config, const models::SingleModel& model)
      : MemoryCheckpoint(std::move(config), std::map<std::string, torch::Tensor>()) {
    for (const auto& item : model.named_parameters()) tensors[item.key()] = item.value().detach().clone();
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> all;
    for (const auto& [name, tensor] : tensors) all.push_back(name);
    return all;
  }
  bool contains(const std::string& name) const override { return tensors.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return tensors.at(name).sizes().vec(); }
  at::ScalarType dtype(const std::string& name) const override { return tensors.at(name).scalar_type(); }
  at::Tensor tensor(const std::string& name) const override { return tensors.at(name); }
  void read_into(const std::string& name, at::Tensor destination) const override {
    destination.copy_(tensors.at(name));
  }
  std::optional<std::string> tokenizer_json() const override { return std::nullopt; }
  Json tokenizer_config() const override { return Json::object(); }
  formats::ChatTemplates chat_templates() const override { return {}; }
  Json generation_config() const override { return Json::object(); }
  std::string fingerprint() const override { return "sha256:memory"; }

  void config_is(Json config) { config_ = std::move(config); }

  std::map<std::string, torch::Tensor> tensors;
};

}  // namespace moesaic::test
