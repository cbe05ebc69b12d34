// Small random models over the golden tokenizers, and compositions of them whose connections do something.
#pragma once
#include "moesaic/compose/folder.h"
#include "moesaic/formats/model_folder.h"
#include "tests/compose/tokenizers.h"
#include "tests/models/tiny_models.h"

namespace moesaic::test {

/// config.json of a llama-like model. Odd sizes, grouped heads.
inline Json small_config(int64_t vocab, int64_t hidden, int64_t layers) {
  return {{"model_type", "llama"},         {"vocab_size", vocab},
          {"hidden_size", hidden},         {"intermediate_size", 37},
          {"num_hidden_layers", layers},   {"num_attention_heads", 4},
          {"num_key_value_heads", 2},      {"head_dim", 6},
          {"max_position_embeddings", 512}};
}

/// A model that speaks a golden tokenizer.
inline compose::Member member(const std::string& tokenizer_name, int64_t hidden, int64_t layers, uint64_t seed,
                              const std::string& start = "<s>") {
  const auto tokenizer = golden_tokenizer(tokenizer_name, start);
  return {random_model(small_config(tokenizer->vocab_size(), hidden, layers), torch::kFloat32, seed), tokenizer};
}

/// config.json of a T5 whose distances pass its buckets.
inline Json small_encoder_config(int64_t vocab) {
  return {{"model_type", "t5"},
          {"is_encoder_decoder", true},
          {"vocab_size", vocab},
          {"d_model", 14},
          {"d_ff", 37},
          {"d_kv", 6},
          {"num_layers", 3},
          {"num_heads", 2},
          {"relative_attention_num_buckets", 8},
          {"relative_attention_max_distance", 6}};
}

/// An encoder-decoder whose encoder reads prompts, width 14, 3 blocks.
inline compose::Member encoder_member(uint64_t seed) {
  const auto tokenizer = encoder_tokenizer();
  return {random_seq2seq(small_encoder_config(tokenizer->vocab_size()), torch::kFloat32, seed), tokenizer};
}

/// A member as a Hugging Face folder.
inline void write_member(const std::filesystem::path& dir, const compose::Member& made, Json config) {
  formats::ModelFolder folder;
  folder.config = std::move(config);
  for (const auto& item : made.model->named_parameters()) folder.tensors[item.key()] = item.value();
  folder.tokenizer.json = made.tokenizer->json();
  folder.tokenizer.config = made.tokenizer->config();
  formats::write_model_folder(dir, folder);
}
inline void write_small_model(const std::filesystem::path& dir, const std::string& tokenizer_name, int64_t hidden,
                              int64_t layers, uint64_t seed) {
  const compose::Member made = member(tokenizer_name, hidden, layers, seed);
  write_member(dir, made, small_config(made.tokenizer->vocab_size(), hidden, layers));
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
      config_of({std::move(how)}), member("gpt2", 20, 3, 1, start), std::vector{member("llama3", 14, 4, 2, start)}, 7);
  randomise(*composition);
  return composition;
}

inline torch::Tensor logits_of(compose::Composition& composition, const std::vector<std::vector<int64_t>>& sequences,
                               const nn::Borders& borders = {}, models::Memory* memory = nullptr) {
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  return composition.head().logits(
      composition.hidden({nn::RaggedBatch::from_sequences(sequences), borders}, pass, memory));
}

/// The final hidden states with a graph.
inline torch::Tensor hidden_of(compose::Composition& composition, const std::vector<std::vector<int64_t>>& sequences) {
  nn::Pass pass;
  return composition.hidden({nn::RaggedBatch::from_sequences(sequences)}, pass);
}

}  // namespace moesaic::test
