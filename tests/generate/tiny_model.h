// A tiny random Llama and a word tokenizer, for tests of what runs models.
#pragma once
#include "moesaic/models/causal_lm.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::testing {

constexpr int64_t kTinyVocab = 24;

/// Scales an activation by the number its sequence has as its sentence.
struct SentenceScale : nn::ScaleAdapter {
  torch::Tensor forward(const torch::Tensor& y, nn::Pass& pass) override {
    const torch::Tensor factors = pass.sentence.index_select(0, pass.segments);  // [N, 1]
    return y * (y.dim() == 3 ? factors.unsqueeze(-1) : factors);
  }
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass& pass) override {
    return forward(act, pass) * up;
  }
  bool trains() const override { return false; }
  int64_t saved_per_row() const override { return 0; }
};

/// SentenceScale at every output of a model: an adapter that reads one number per sequence.
class SentenceScales : public nn::Attachment {
 public:
  static void attach(models::CausalLM& model) { model.attach("scales", std::make_shared<SentenceScales>(model)); }
  explicit SentenceScales(models::CausalLM& model) {
    for (const nn::ScaleSite& site : model.sites().scales) {
      if (site.kind != nn::ScaleKind::kOutput && site.kind != nn::ScaleKind::kFfn) continue;
      site.slot->adapters.push_back(std::make_shared<SentenceScale>());
    }
  }
  nn::Needs needs() const override { return {.sentence = nn::Needs::Sentence::kColumn, .sentence_width = 1}; }
  void name_as(const std::string& owner, int64_t) override { owner_ = owner; }
  void detach() override {}
};

/// Weights large enough that logits differ clearly.
inline std::shared_ptr<models::CausalLM> tiny_model(uint64_t seed = 1) {
  models::DecoderConfig config;
  config.model_type = "llama";
  config.vocab_size = kTinyVocab;
  config.hidden_size = 16;
  config.intermediate_size = 20;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 4;
  config.eos_ids = {1};
  auto model = std::make_shared<models::CausalLM>(config, torch::TensorOptions().dtype(torch::kFloat32));
  torch::NoGradGuard no_grad;
  torch::manual_seed(seed);
  for (auto& entry : model->named_parameters()) {
    if (entry.key().find("norm") != std::string::npos) {
      entry.value().fill_(1);
    } else {
      entry.value().normal_(0, 0.4);
    }
  }
  model->eval();
  return model;
}

/// tiny_model() whose rotary frequencies follow a text's length from `original` tokens on.
inline std::shared_ptr<models::CausalLM> dynamic_model(int64_t original) {
  const auto plain = tiny_model();
  models::DecoderConfig config = plain->config();
  config.rope = {.type = "dynamic", .factor = 3.0, .original_max_position = original};
  auto model = std::make_shared<models::CausalLM>(config, torch::TensorOptions().dtype(torch::kFloat32));
  torch::NoGradGuard no_grad;
  for (auto& entry : model->named_parameters()) entry.value().copy_(plain->named_parameters()[entry.key()]);
  model->eval();
  return model;
}

/// Words w0 .. w23 separated by spaces; w0 begins, w1 ends a text.
inline std::shared_ptr<tokenizer::Tokenizer> word_tokenizer() {
  Json vocab = Json::object();
  for (int64_t i = 0; i < kTinyVocab; ++i) vocab["w" + std::to_string(i)] = i;
  const Json file = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", Json::array()},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                     {"post_processor", nullptr},
                     {"decoder", nullptr},
                     {"model", {{"type", "WordLevel"}, {"vocab", vocab}, {"unk_token", "w2"}}}};
  return std::make_shared<tokenizer::Tokenizer>(file.dump(), Json{{"bos_token", "w0"}, {"eos_token", "w1"}}, "test");
}

}  // namespace moesaic::testing
