// What differs between decoder-only models: models/<family>.cpp fills it from config.json.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "moesaic/formats/expert_names.h"
#include "moesaic/nn/kernel_table.h"
#include "moesaic/nn/rope.h"

namespace moesaic::models {

using Activation = nn::GluKind;
using nn::RopeConfig;

/// Feed-forward networks behind a router, in some layers or all.
struct SparseConfig {
  int64_t experts = 0, top_k = 0;       // how many there are, and how many a token has
  int64_t width = 0;                    // of each
  bool renormalize = true;              // the weights of the chosen sum to 1
  int64_t shared_width = 0;             // of the one that every token has; 0 = none
  bool shared_gate = false;             // it is weighed by a sigmoid of its own
  std::vector<uint8_t> layer_is_dense;  // per layer; empty = none
  formats::ExpertNames names;           // in the checkpoint
};

/// Everything that differs between decoder families.
struct DecoderConfig {
  std::string model_type;  // config.json's
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position = 2048;  // longest text it was trained on
  double rms_norm_eps = 1e-6;
  Activation activation = Activation::kSilu;                // of the gate
  bool qkv_bias = false, o_bias = false, mlp_bias = false;  // which linears add a bias
  bool qk_norm = false;                                     // per-head RMSNorm on queries and keys (qwen3, gemma3)
  bool flat_qk_norm = false;                                // of all heads as one (olmoe)
  double clip_qkv = 0.0;                                    // queries, keys and values stay within; 0 = off (olmoe)
  bool tie_word_embeddings = false;                         // the head is the embedding
  bool norm_plus_one = false;                               // RMSNorm multiplies by (1 + weight) (gemma)
  bool pre_post_norms = false;                              // norms before and after both halves of a layer (gemma3)
  double embedding_scale = 1.0;                             // gemma: sqrt(d), rounded to the weights' dtype
  double residual_scale = 1.0;                              // of what each half of a layer adds (granite)
  double logit_scale = 1.0;                                 // of the final hidden states (granite)
  double query_scale = 0.0;                                 // attention scale; 0 = 1/sqrt(head_dim)
  double attention_softcap = 0.0, final_softcap = 0.0;      // 0 = off
  int64_t sliding_window = 0;                               // 0 = none
  std::vector<uint8_t> layer_is_sliding;  // per layer; empty = all layers sliding when sliding_window > 0
  RopeConfig rope;                        // global layers
  std::optional<RopeConfig> rope_local;   // sliding layers, when they have their own base (gemma3)
  std::vector<int64_t> eos_ids;           // end an answer
  int64_t bos_id = -1;
  std::optional<SparseConfig> sparse;
};

}  // namespace moesaic::models
