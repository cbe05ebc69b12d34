// Ragged batches, and what travels beside the activations of one forward pass.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moesaic::nn {

class Block;
class KvCache;
struct Source;

/// B sequences laid end to end; no padding exists anywhere. N = offsets.back() rows.
struct RaggedBatch {
  torch::Tensor tokens;          // [N] int64
  std::vector<int64_t> offsets;  // [B+1], offsets[0] = 0; sequence b is rows offsets[b] .. offsets[b+1]

  int64_t batch_size() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t num_tokens() const { return offsets.back(); }
  /// Rows of each sequence, [B].
  std::vector<int64_t> counts() const;
  /// Lays `sequences` end to end on `device`. Throws ShapeError when one is empty.
  static RaggedBatch from_sequences(const std::vector<std::vector<int64_t>>& sequences,
                                    torch::Device device = torch::kCPU);
};

/// For each sequence the numbers of its tokens behind which the text is known to end, ascending: the ends of prompts.
/// Empty = none.
using Borders = std::vector<std::vector<int64_t>>;

/// cos and sin of the rotary angles of every row, [N, k/2] float32.
struct RotaryTables {
  torch::Tensor cos, sin;
};

/// What one router decided at one site in one forward pass.
struct RoutingRecord {
  std::string owner;  // the adapter's name, or the place of the model that carries it: "augmenting.0"
  std::string site;   // module path, e.g. "model.layers.0.self_attn.q_proj"
  int64_t layer;
  bool trained;            // the router's weights require a gradient
  torch::Tensor logits;    // [M, E] float32; M = N, N*H (per head, head-minor) or B (sentence router)
  torch::Tensor probs;     // [M, E] float32, the softmax over all experts, before top-k
  torch::Tensor weights;   // [M, E] float32, what mixes the experts, after top-k
  int64_t rows_per_token;  // 1, or H for a per-head router; 0 for one row per sequence
};

/// What one connection of a composition read in one forward pass.
struct ReadingRecord {
  int64_t source;                             // which augmenting model
  int64_t connection;                         // the connection's place among those of its source
  torch::Tensor added;                        // [N] |Y| / |H_B|
  std::vector<torch::Tensor> weights;         // per sequence [H, T, S] float32, 0 where nothing is seen
  std::vector<int64_t> query_offsets;         // [B+1]
  std::vector<int64_t> visible;               // [N]: how many of its sequence's S source tokens each row sees
  std::vector<std::vector<int64_t>> sources;  // per sequence the source's S token ids
};

/// Neighbouring rows [begin, end) with the same weights of the attached adapters, [A].
struct MixtureRun {
  int64_t begin, end;
  const float* weights;
};

/// One forward pass: what its caller asks for, and what the model fills in on the way.
struct Pass {
  // Asked for by the caller.
  bool training = false;                           // dropout and router jitter are on
  double dropout = 0.0;                            // while training, at the model's own sites (T5 has some)
  std::optional<at::Generator> generator{};        // what both draw from; empty = LibTorch's own
  std::vector<RoutingRecord>* routing = nullptr;   // when set, every router appends its record
  std::vector<ReadingRecord>* readings = nullptr;  // when set, every connection appends its record
  /// Runs a block in place of Block::forward: checkpointed, watched, with something added. Empty = as it is.
  std::function<torch::Tensor(Block& block, const torch::Tensor& h, Pass& pass)> run;

  std::string place;  // of the model within a composition, "augmenting.0"; "" of a single model

  // Filled in by the model; read by attention, caches and adapters.
  std::vector<int64_t> offsets;    // of the ragged batch
  torch::Tensor positions;         // [N] int64, position of each row in its sequence (remembered ones included)
  torch::Tensor segments;          // [N] int64, sequence of each row
  RotaryTables rope;               // of global blocks
  RotaryTables rope_local;         // of sliding blocks with their own base, else undefined
  KvCache* cache = nullptr;        // keys and values of earlier tokens; nullptr when training
  torch::Tensor sentence;          // [B, d_e] float32, for router input `sentence`; undefined otherwise
  torch::Tensor mixture;           // [B, A] float32: each row's weight of every attached adapter; undefined = all 1
  torch::Tensor layer_input;       // [N, d], normed input of the current attention or FFN; set by the block
  std::shared_ptr<Source> source;  // what cross-attention reads; nullptr without an encoder

  /// `block` over h, by `run` when it is set.
  torch::Tensor forward(Block& block, const torch::Tensor& h);
  /// A pass with the same wishes, through another model.
  Pass sibling() const;
  /// A pass of this one's wishes and sequences over the rows of its source: for what cross-attention makes of them.
  Pass over_source() const;
  /// mixture[:, column] of every row, [N, 1] float32; undefined when there is no mixture or column is negative.
  torch::Tensor adapter_weight(int64_t column) const;
  /// All rows in runs of one mixture; none when there is no mixture. Their weights live as long as `mixture`, which is
  /// on the CPU.
  std::vector<MixtureRun> mixture_runs() const;
};

}  // namespace moesaic::nn
