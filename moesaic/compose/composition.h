// An anchor model that reads augmenting models through learned connections. All models are frozen; only the
// connections are trained.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"
#include "moesaic/compose/alignment.h"
#include "moesaic/compose/connection.h"
#include "moesaic/compose/state_cache.h"
#include "moesaic/models/causal_lm.h"

namespace moesaic::compose {

/// Where a connection reads and where it adds. Blocks count from 0; -1 is the embedding's output.
struct ConnectionPair {
  int64_t anchor, aug;
  bool operator==(const ConnectionPair&) const = default;
};

/// The ends of n equal groups of blocks in both models: ceil((m + 1) N / n) - 1, m = 0 .. n-1. Throws ConfigError
/// when a model has fewer than n blocks.
std::vector<ConnectionPair> evenly_spaced(int64_t num_connections, int64_t anchor_layers, int64_t aug_layers);
/// The anchor's attention heads, reduced until they divide its width into parts of even width.
int64_t default_heads(const models::DecoderConfig& anchor);

/// How one augmenting model is joined.
struct AugmentingConfig {
  std::vector<ConnectionPair> connections;
  std::string align = "word";   // word | token | mixed
  std::string mask = "causal";  // causal | prefix | full; see Alignment
  bool operator==(const AugmentingConfig&) const = default;
};

/// Blocks of the augmenting model that are run: up to the highest connected one.
int64_t num_blocks(const AugmentingConfig& config);

/// Everything that defines a composition beside its models.
struct CompositionConfig {
  ConnectionConfig connection;
  std::vector<AugmentingConfig> augmenting;
};

/// Throws ConfigError with everything that does not fit the models, in one message.
void validate(const CompositionConfig& config, const models::DecoderConfig& anchor,
              const std::vector<models::DecoderConfig>& augmenting, const std::string& where);

/// A model of a composition. Without a tokenizer (for all or none) the ids pass through.
struct Member {
  std::shared_ptr<models::CausalLM> model;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
  std::shared_ptr<formats::Checkpoint> checkpoint{};  // where it came from; nullptr when made in memory
  std::optional<uint64_t> random_seed{};              // its numbers are drawn, not read from the checkpoint
  std::shared_ptr<adapters::Adapter> adapter{};       // attached to `model`, of which it must be destroyed first
};

/// For each sequence the numbers of its tokens behind which the text is known to end, ascending: the ends of prompts.
/// Empty = none.
using Borders = std::vector<std::vector<int64_t>>;

/// What one augmenting model reads of a ragged batch.
struct AlignedBatch {
  std::vector<std::vector<int64_t>> tokens;       // per sequence; may be empty
  std::vector<std::vector<int64_t>> coordinates;  // of each: place in the anchor's sequence of the first row to see it
  Visibility seen;                                // by every anchor row
};

/// Everything that decoding keeps between steps: a cache per model and per connection, and the readings of the text.
struct CompositionState {
  struct Stream {
    std::vector<Aligner> aligners;  // per sequence
    nn::KvCache model;              // of the augmenting model
    nn::KvCache connections;        // keys and values that the anchor attends to, a layer per connection
  };
  nn::KvCache anchor;
  std::vector<Stream> streams;

  /// Drops everything of sequence b behind its first `length` anchor tokens.
  void truncate(int64_t b, int64_t length);
  /// The sequences `rows` in that order, with repeats; nothing is shared.
  CompositionState select(const std::vector<int64_t>& rows) const;
};

/// How a training pass saves work.
struct TrainingPass {
  StateCache* states = nullptr;  // of what is frozen: nullptr = computed every time
  /// Runs one of the anchor's blocks that have a graph; empty = CausalLM::run_layers.
  std::function<torch::Tensor(int64_t block, const torch::Tensor& h)> run_block;
};

/// What one connection did in a pass, for people to look at.
struct ConnectionRecord {
  size_t augmenting, connection;       // the connection's place among those of its augmenting model
  torch::Tensor added;                 // [N] |Y| / |H_B|
  std::vector<torch::Tensor> weights;  // ConnectionImpl::attention_weights
};

/// H_B,j <- H_B,j + sum_k Y_k over the connections k at block j, each from the same H_B,j. Augmenting models run up to
/// their highest connected block, without their heads. parameters() are the connections' alone, float32, named
/// "connections.<k>.{proj,q_proj,k_proj,v_proj,o_proj}.{weight,bias}"; k runs over the augmenting models' in order.
///
/// Without a state, what is frozen is computed without a graph: the augmenting models, and the anchor up to its lowest
/// connected block. On the CPU in float32 a sequence's frozen states are the same bit for bit whatever is beside it in
/// the batch: every GEMM gets so many rows that the library computes each of them alike.
class Composition : public torch::nn::Module {
 public:
  /// Connections with their start values. Throws ConfigError.
  Composition(CompositionConfig config, Member anchor, std::vector<Member> augmenting, uint64_t seed);

  const CompositionConfig& config() const { return config_; }
  models::CausalLM& anchor() const { return *anchor_.model; }
  const Member& anchor_member() const { return anchor_; }
  const std::vector<Member>& augmenting() const { return augmenting_; }

  /// What each augmenting model reads of `batch`. With a `state` the tokens continue its readings.
  std::vector<AlignedBatch> align(const nn::RaggedBatch& batch, const Borders& borders,
                                  CompositionState* state = nullptr) const;
  /// The last block's output with its connections added, before the final norm: [N, D_B]. Differentiable. `context` is
  /// the anchor's.
  torch::Tensor run_layers(const nn::RaggedBatch& batch, const std::vector<AlignedBatch>& aligned,
                           nn::ForwardContext& context, const TrainingPass& pass = {});
  /// The final norm's output, [N, D_B]. With a `state` the batch continues it (gradients off, no mask `full`).
  torch::Tensor hidden_states(const nn::RaggedBatch& batch, const Borders& borders, nn::ForwardContext& context,
                              CompositionState* state = nullptr);

  CompositionState make_state(int64_t batch_size) const;

  /// What every connection does in a pass without a cache, in their order.
  std::vector<ConnectionRecord> watch(const nn::RaggedBatch& batch, const std::vector<AlignedBatch>& aligned);

  /// Whether the models' adapters are trained with the connections; at first they are frozen.
  void train_adapters(bool on);
  bool trains_adapters() const { return trains_adapters_; }
  /// The adapters with their places: "anchor" or "augmenting.<m>".
  std::vector<std::pair<std::string, adapters::Adapter*>> adapters() const;
  /// The anchor's first block that needs a graph.
  int64_t first_trained_block() const;

 private:
  struct Stream {
    std::shared_ptr<const Alignment> alignment;
    std::vector<Connection> connections;
    std::vector<int64_t> blocks;  // of the augmenting model, by connection
  };
  bool is_trained(const Member& member) const { return trains_adapters_ && member.adapter != nullptr; }
  std::string identity(const Member& member, const std::string& role) const;
  std::vector<torch::Tensor> frozen_states(const Member& member, const std::string& role,
                                           const std::vector<int64_t>& blocks,
                                           const std::vector<std::vector<int64_t>>& sequences, StateCache* cache) const;
  std::vector<KeysValues> read(size_t m, const AlignedBatch& aligned, CompositionState::Stream* state, bool training,
                               StateCache* cache);
  torch::Tensor run(const nn::RaggedBatch& batch, const std::vector<AlignedBatch>& aligned, nn::ForwardContext& context,
                    CompositionState* state, const TrainingPass& pass,
                    std::vector<ConnectionRecord>* records = nullptr);

  CompositionConfig config_;
  Member anchor_;
  std::vector<Member> augmenting_;
  std::vector<Stream> streams_;
  std::unique_ptr<nn::Rope> rope_;  // nullptr without cross positions
  int64_t lowest_anchor_block_ = 0;
  bool trains_adapters_ = false;
  mutable std::map<std::string, std::string> identities_;  // of frozen members by role, once asked for
};

}  // namespace moesaic::compose
