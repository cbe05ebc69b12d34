// Decoder-only language models. One DecoderConfig describes every family; models/<family>.cpp fills it from
// config.json.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/nn/context.h"
#include "moesaic/nn/kernel_table.h"
#include "moesaic/nn/kv_cache.h"
#include "moesaic/nn/rope.h"
#include "moesaic/nn/site.h"

namespace moesaic::models {

using Activation = nn::GluKind;
using nn::RopeConfig;

/// Everything that differs between decoder families.
struct DecoderConfig {
  std::string model_type;
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position = 2048;
  double rms_norm_eps = 1e-6;
  Activation activation = Activation::kSilu;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;  // per-head RMSNorm on queries and keys (qwen3, gemma3)
  bool tie_word_embeddings = false;
  bool norm_plus_one = false;                           // RMSNorm multiplies by (1 + weight) (gemma)
  bool pre_post_norms = false;                          // norms before and after both halves of a layer (gemma3)
  double embedding_scale = 1.0;                         // gemma: sqrt(d), rounded to the weights' dtype
  double query_scale = 0.0;                             // attention scale; 0 = 1/sqrt(head_dim)
  double attention_softcap = 0.0, final_softcap = 0.0;  // 0 = off
  int64_t sliding_window = 0;                           // 0 = none
  std::vector<uint8_t> layer_is_sliding;                // per layer; empty = all layers sliding when sliding_window > 0
  RopeConfig rope;                                      // global layers
  std::optional<RopeConfig> rope_local;                 // sliding layers, when they have their own base (gemma3)
  std::vector<int64_t> eos_ids;
  int64_t bos_id = -1;
};

/// Parses config.json (as transformers 4 and 5 write it) of any registered family.
/// Throws ConfigError for an unknown model_type (with the known ones) or impossible values (zero, negative, NaN, huge).
DecoderConfig parse_decoder_config(const Json& config, const std::string& where);
/// The registered model_type names.
std::vector<std::string> known_model_types();

struct LoadOptions {
  torch::ScalarType dtype = torch::kFloat32;  // of the frozen weights and activations
  torch::Device device = torch::kCPU;
  bool quantize_int8 = false;  // weight-only int8, for decoding
  int64_t num_blocks = -1;     // the first blocks alone, without the head: the whole file is checked, this much is read
};

/// A decoder-only model. Parameters carry the Hugging Face names; none requires grad.
class CausalLM : public torch::nn::Module {
 public:
  /// Builds with uninitialised weights; device kMeta allocates nothing.
  CausalLM(const DecoderConfig& config, const torch::TensorOptions& options);
  ~CausalLM() override;

  /// Loads every weight: each tensor of the file is used once and each parameter gets one, or DataError lists all that
  /// do not fit.
  static std::shared_ptr<CausalLM> load(const formats::Checkpoint& checkpoint, const LoadOptions& options);

  const DecoderConfig& config() const { return config_; }
  nn::Sites& sites() { return sites_; }
  torch::Device device() const;
  torch::ScalarType dtype() const;

  /// Fills offsets, positions and segments of `context` (positions start at the cache's lengths).
  void prepare(const nn::RaggedBatch& batch, nn::ForwardContext& context) const;
  /// [N] tokens -> [N, d] embeddings.
  torch::Tensor embed(const torch::Tensor& tokens) const;
  /// Runs layers first .. last-1 on h [N, d]. `context` was prepared.
  torch::Tensor run_layers(torch::Tensor h, int64_t first, int64_t last, nn::ForwardContext& context);
  /// The final norm.
  torch::Tensor final_norm(const torch::Tensor& h) const;
  /// prepare + embed + all layers + final norm (+ cache commit): [N, d].
  torch::Tensor hidden_states(const nn::RaggedBatch& batch, nn::ForwardContext& context);
  /// hidden [M, d] -> logits [M, V] float32, soft-capped where configured.
  torch::Tensor logits(const torch::Tensor& hidden) const;
  /// The head's matrix [V, d] (the embedding's when tied).
  const torch::Tensor& head_weight() const;

  nn::KvCache make_cache(int64_t batch_size) const;

 private:
  struct Impl;
  DecoderConfig config_;
  nn::Sites sites_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic::models
