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
#include "moesaic/models/seq2seq_lm.h"

namespace moesaic::compose {

/// What stands behind a model's final norm, where its head reads, as a place among its blocks.
inline constexpr int64_t kFinal = int64_t{1} << 32;

/// Where a connection reads and where it adds. Blocks count from 0; -1 is the embedding's output.
struct ConnectionPair {
  int64_t anchor, aug;
  bool newest = false;  // reads the newest state alone, without attention
  bool operator==(const ConnectionPair&) const = default;
};

/// As configs have it: {"anchor": place, "aug": place, "reads": "all" | "newest"}, a place being a block's
/// number or "final". Throws ConfigError for anything else.
ConnectionPair parse_pair(const Json& json, const std::string& where);
OrderedJson pair_json(const ConnectionPair& pair);

/// The ends of n equal groups of blocks in both models: ceil((m + 1) N / n) - 1, m = 0 .. n-1. Throws ConfigError
/// when a model has fewer than n blocks.
std::vector<ConnectionPair> evenly_spaced(int64_t num_connections, int64_t anchor_layers, int64_t aug_layers);
/// What of an anchor a composition's sizes follow from. Of an encoder-decoder the decoder's: there the connections add.
struct Anchor {
  int64_t blocks, width, heads;
  double norm_eps;
  double rope_theta;  // of cross positions; 10,000 of a model without rotary ones
  bool has_encoder;
};
Anchor anchor_of(const Json& config, const std::string& where);
Anchor anchor_of(const models::SingleModel& model);

/// The anchor's attention heads, reduced until they divide its width into parts of even width.
int64_t default_heads(const Anchor& anchor);

/// What of an augmenting model a composition's sizes follow from.
struct Reader {
  int64_t blocks, width;
  bool ahead;  // an encoder: what it makes of a token depends on those behind it
};
Reader reader_of(const models::SingleModel& model);
Reader reader_of(const Json& config, const std::string& where);

/// How one augmenting model is joined.
struct AugmentingConfig {
  std::vector<ConnectionPair> connections;  // which of its blocks the anchor's blocks read
  std::string align = "word";               // word | token | mixed | text; an encoder reads all at once: word
  std::string mask = "causal";              // causal | prefix | full; see Alignment. An encoder's is prefix
  bool operator==(const AugmentingConfig&) const = default;
};

/// Blocks of the augmenting model that are run: up to the highest connected one; more than there are is all.
int64_t num_blocks(const AugmentingConfig& config);

/// Everything that defines a composition beside its models.
struct CompositionConfig {
  ConnectionConfig connection;               // of all connections
  std::vector<AugmentingConfig> augmenting;  // one of each augmenting model
};

/// Throws ConfigError with everything that does not fit the models, in one message.
void validate(const CompositionConfig& config, const Anchor& anchor, const std::vector<Reader>& augmenting,
              const std::string& where);

/// A model of a composition. Without a tokenizer (for all or none) the ids pass through.
struct Member {
  std::shared_ptr<models::SingleModel> model;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
  std::shared_ptr<formats::Checkpoint> checkpoint{};  // where it came from; nullptr when made in memory
  std::optional<uint64_t> random_seed{};              // its numbers are drawn, not read from the checkpoint
  std::shared_ptr<adapters::Adapter> adapter{};       // carried: attached to `model`, with weight 1 for every request
};

/// What one position of the anchor saw of an augmenting model's reading that the next ones spell anew.
struct Aside {
  int64_t behind;  // so many tokens of the sequence stand in front of it
  std::vector<int64_t> tokens;
};

/// What one augmenting model reads of a ragged batch.
struct AlignedBatch {
  std::vector<std::vector<int64_t>> tokens;       // per sequence; may be empty
  std::vector<std::vector<Aside>> asides;         // per sequence, by position (empty = none); keys behind its tokens'
  std::vector<std::vector<int64_t>> coordinates;  // of both: place in the anchor's sequence from which on it stands
  Visibility seen;                                // by every anchor row
};

/// What decoding keeps between steps: a cache per model and per connection, and the readings of the text.
class CompositionMemory : public models::Memory {
 public:
  struct Stream {
    std::shared_ptr<const Alignment> alignment;
    std::vector<Aligner> aligners;  // per sequence
    nn::KvCache model;              // of the augmenting model
    nn::KvCache connections;        // keys and values that the anchor attends to, a layer per connection

    /// Both caches of sequence b.
    void truncate(int64_t b, int64_t tokens);
  };
  CompositionMemory(std::unique_ptr<models::Memory> anchor, std::vector<Stream> streams);

  int64_t sequences() const override { return anchor->sequences(); }
  int64_t length(int64_t b) const override { return anchor->length(b); }
  int64_t token_bytes() const override;
  void truncate(int64_t b, int64_t length) override;

  std::unique_ptr<models::Memory> anchor;
  std::vector<Stream> streams;

 protected:
  void keep_sequences(const std::vector<int64_t>& rows) override;
  void add_sequences(int64_t count) override;
};

/// H_B,j <- H_B,j + sum_k Y_k over the connections k at block j, each from the same H_B,j; with j = kFinal behind the
/// anchor's final norm, before its head. Augmenting models run up to their highest connected block, without their
/// heads; of an encoder-decoder the encoder does, once, over the prompt: an answer's tokens never reach it, and no row
/// before the prompt's last sees its states. Of an anchor that is one the decoder's blocks are connected, and each of
/// its rows sees what the text's row sees that it stands for. parameters() are the connections' alone, float32, named
/// "connections.<k>.{proj,q_proj,k_proj,v_proj,o_proj}.{weight,bias}"; k runs over the augmenting models' in order.
///
/// As a Module it is in evaluation mode until it is trained. In training mode, what is frozen is computed without a
/// graph and apart from the rest: the augmenting models, and the anchor up to its lowest connected block. On the CPU in
/// float32 a sequence's frozen states are then the same bit for bit whatever is beside it in the batch: see
/// nn::AlikeRows.
class Composition : public torch::nn::Module, public models::LanguageModel {
 public:
  /// Connections with their start values. Throws ConfigError.
  Composition(CompositionConfig config, Member anchor, std::vector<Member> augmenting, uint64_t seed);
  ~Composition() override;

  const CompositionConfig& config() const { return config_; }
  const Member& anchor_member() const { return anchor_; }
  const std::vector<Member>& augmenting() const { return augmenting_; }

  /// What each augmenting model reads of `batch`. With a `memory` the tokens continue its readings.
  std::vector<AlignedBatch> align(const nn::RaggedBatch& batch, const nn::Borders& borders,
                                  CompositionMemory* memory = nullptr) const;

  const models::Facts& facts() const override { return facts_; }
  const nn::Head& head() const override { return anchor_.model->head(); }
  std::unique_ptr<models::Memory> memory(int64_t sequences) const override;
  int64_t exact_memory() const override;
  std::vector<models::Part> parts() override;
  std::vector<nn::Block*> blocks() override;
  std::vector<torch::Tensor> weights() const override;
  int64_t activation_bytes(int64_t tokens, bool checkpointing) override;
  OrderedJson structure() const override;
  std::vector<int64_t> continued(const std::vector<int64_t>& prompt) const override;
  std::vector<std::string> source_texts(int64_t source, const std::vector<int64_t>& ids) const override;
  nn::Needs needs() const override;

  /// Whether the members' adapters are trained with the connections; at first they are frozen.
  void train_adapters(bool on);
  bool trains_adapters() const { return trains_adapters_; }
  /// The carried adapters with their places: "anchor" or "augmenting.<m>".
  std::vector<std::pair<std::string, adapters::Adapter*>> adapters() const;
  /// Keeps frozen states of training passes from one epoch to the next.
  void keep_states(std::shared_ptr<StateCache> states) { states_ = std::move(states); }
  /// Bytes of frozen states that `tokens` tokens have.
  int64_t state_bytes(int64_t tokens) const;

 protected:
  torch::Tensor run(const models::Text& text, nn::Pass& pass, models::Memory* memory) override;
  torch::Tensor prompt_states(const nn::RaggedBatch& prompts) override;

 private:
  struct Stream {
    std::shared_ptr<const Alignment> alignment;
    std::vector<Connection> connections;
    std::vector<int64_t> blocks;  // of the augmenting model, by connection
  };
  bool is_trained(const Member& member) const { return trains_adapters_ && member.adapter != nullptr; }
  /// Frozen states are computed apart, and kept, in training; who watches blocks otherwise sees all of them.
  bool frozen_apart(const nn::Pass& pass) const { return is_training() && (pass.training || !pass.run); }
  /// The anchor's first block that needs a graph.
  int64_t first_trained_block() const { return is_trained(anchor_) ? 0 : encoder_blocks_ + lowest_anchor_block_ + 1; }
  std::string identity(const Member& member, const std::string& role) const;
  std::vector<torch::Tensor> frozen_states(const Member& member, const std::string& role,
                                           const std::vector<int64_t>& blocks,
                                           const std::vector<std::vector<int64_t>>& sequences,
                                           const std::vector<std::vector<Aside>>& asides) const;
  std::vector<KeysValues> read(size_t m, const AlignedBatch& aligned, CompositionMemory::Stream* memory,
                               const nn::Pass& pass);
  torch::Tensor run_decoder(const models::Text& text, const std::vector<AlignedBatch>& aligned,
                            const std::vector<std::vector<KeysValues>>& streams, nn::Pass& own,
                            CompositionMemory* memory, bool apart);
  torch::Tensor run_encoder_decoder(const models::Text& text, const std::vector<AlignedBatch>& aligned,
                                    const std::vector<std::vector<KeysValues>>& streams, nn::Pass& own,
                                    CompositionMemory* memory);
  /// h plus what the connections at `block` of the anchor read.
  torch::Tensor connected(int64_t block, const torch::Tensor& h, const nn::RotaryTables& rope,
                          const std::vector<AlignedBatch>& aligned, const std::vector<std::vector<KeysValues>>& streams,
                          nn::Pass& pass);

  CompositionConfig config_;
  Member anchor_;
  models::Facts facts_;                           // the anchor's
  models::Seq2SeqLM* encoder_decoder_ = nullptr;  // the anchor, where it is one
  int64_t encoder_blocks_ = 0;                    // of such an anchor, in front of those that are connected
  std::vector<Member> augmenting_;
  std::vector<Stream> streams_;
  std::unique_ptr<nn::Rope> rope_;  // nullptr without cross positions
  int64_t lowest_anchor_block_ = 0, highest_anchor_block_ = -1;
  bool trains_adapters_ = false;
  std::shared_ptr<StateCache> states_;
  mutable std::map<std::string, std::string> identities_;  // of frozen members by role, once asked for
};

}  // namespace moesaic::compose
