// Ragged batches and what travels beside the activations of one forward pass.
#pragma once
#include <torch/torch.h>

#include <string>
#include <vector>

namespace moesaic::nn {

class KvCache;

/// B sequences laid end to end; no padding exists anywhere. N = offsets.back() rows.
struct RaggedBatch {
  torch::Tensor tokens;          // [N] int64
  std::vector<int64_t> offsets;  // [B+1], offsets[0] = 0; sequence b is rows offsets[b] .. offsets[b+1]

  int64_t batch_size() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t num_tokens() const { return offsets.back(); }
  /// Lays `sequences` end to end on `device`. Throws ShapeError when one is empty.
  static RaggedBatch from_sequences(const std::vector<std::vector<int64_t>>& sequences,
                                    torch::Device device = torch::kCPU);
};

/// cos and sin of the rotary angles of every row, [N, k/2] float32.
struct RotaryTables {
  torch::Tensor cos, sin;
};

/// What one router decided at one site in one forward pass.
struct RoutingRecord {
  std::string site;  // module path, e.g. "model.layers.0.self_attn.q_proj"
  int64_t layer;
  torch::Tensor logits;    // [M, E] float32; M = N, N*H (per head, head-minor) or B (sentence router)
  torch::Tensor probs;     // [M, E] float32, the softmax over all experts, before top-k
  torch::Tensor weights;   // [M, E] float32, what mixes the experts, after top-k
  int64_t rows_per_token;  // 1, or H for a per-head router; 0 for one row per sequence
};

/// Carried through one forward pass. Filled by the model; read by attention, caches and adapters.
struct ForwardContext {
  std::vector<int64_t> offsets;  // of the ragged batch
  torch::Tensor positions;       // [N] int64, position of each row in its sequence (cache length included)
  torch::Tensor segments;        // [N] int64, sequence of each row
  RotaryTables rope;             // of global layers
  RotaryTables rope_local;       // of sliding layers with their own base, else undefined
  KvCache* cache = nullptr;      // keys and values of earlier tokens; nullptr when training
  torch::Tensor sentence;        // [B, d_e] float32, for router input `sentence`; undefined otherwise
  torch::Tensor layer_input;     // [N, d], normed input of the current attention or FFN; set by the decoder layer
  bool training = false;         // dropout and router jitter are on
  std::vector<RoutingRecord>* routing = nullptr;  // when set, every router appends its record
};

}  // namespace moesaic::nn
