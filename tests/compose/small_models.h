// Small random models over the golden tokenizers, and compositions of them whose connections do something.
#pragma once
#include "moesaic/compose/composition.h"
#include "tests/compose/tokenizers.h"
#include "tests/models/tiny_models.h"

namespace moesaic::test {

/// A random llama-like model as wide as `vocab` needs. Odd sizes, grouped heads.
inline std::shared_ptr<models::CausalLM> small_model(int64_t vocab, int64_t hidden, int64_t layers, uint64_t seed,
                                                     const Json& changes = Json::object(),
                                                     torch::Dtype dtype = torch::kFloat32) {
  Json config{{"model_type", "llama"},         {"vocab_size", vocab},
              {"hidden_size", hidden},         {"intermediate_size", 37},
              {"num_hidden_layers", layers},   {"num_attention_heads", 4},
              {"num_key_value_heads", 2},      {"head_dim", 6},
              {"max_position_embeddings", 512}};
  config.update(changes);
  return random_model(config, dtype, seed);
}

/// A model that speaks a golden tokenizer.
inline compose::Member member(const std::string& tokenizer_name, int64_t hidden, int64_t layers, uint64_t seed,
                              const Json& changes = Json::object(), const std::string& start = "<s>") {
  const auto tokenizer = golden_tokenizer(tokenizer_name, start);
  return {small_model(tokenizer->vocab_size(), hidden, layers, seed, changes), tokenizer};
}

/// Fills every parameter of the connections with numbers that show in the logits.
inline void randomise(compose::Composition& composition, uint64_t seed = 5) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(seed);
  for (auto& parameter : composition.parameters()) {
    const double deviation = parameter.dim() == 2 ? 1.0 / std::sqrt(static_cast<double>(parameter.size(1))) : 0.3;
    parameter.normal_(0.0, deviation);
  }
}

inline compose::CompositionConfig config_of(std::vector<compose::AugmentingConfig> augmenting, int64_t heads = 2) {
  compose::CompositionConfig config;
  config.connection.num_heads = heads;
  config.augmenting = std::move(augmenting);
  return config;
}

/// Anchor gpt2 of width 20 and 3 blocks, augmenting llama3 of width 14 and 4 blocks, two connections.
inline std::shared_ptr<compose::Composition> two_tokenizers(compose::AugmentingConfig how = {{{0, 1}, {2, 2}}},
                                                            const std::string& start = "<s>") {
  auto composition = std::make_shared<compose::Composition>(
      config_of({std::move(how)}), member("gpt2", 20, 3, 1, Json::object(), start),
      std::vector{member("llama3", 14, 4, 2, Json::object(), start)}, 7);
  randomise(*composition);
  return composition;
}

inline torch::Tensor logits_of(compose::Composition& composition, const std::vector<std::vector<int64_t>>& sequences,
                               const compose::Borders& borders = {}, compose::CompositionState* state = nullptr) {
  torch::NoGradGuard no_grad;
  nn::ForwardContext context;
  return composition.anchor().logits(
      composition.hidden_states(nn::RaggedBatch::from_sequences(sequences), borders, context, state));
}

}  // namespace moesaic::test
