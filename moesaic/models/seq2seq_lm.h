// Encoder-decoders: an encoder reads the prompt, a decoder writes behind a start token and reads the encoder's states.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/models/decoder_config.h"
#include "moesaic/models/single_model.h"
#include "moesaic/models/stack.h"
#include "moesaic/nn/feed_forward.h"
#include "moesaic/nn/kv_cache.h"
#include "moesaic/nn/source.h"

namespace moesaic::models {

/// Everything that differs between encoder-decoders.
struct Seq2SeqConfig {
  /// Two stacks of Gemma's kind, each with an embedding of its own; of T5Gemma 2 with one for both, and the decoder's
  /// attention reads the source, too.
  struct Halves {
    DecoderConfig encoder, decoder;
    bool merged = false;
    int64_t image_end_id = -1;  // a token with an embedding of its own
  };

  /// Switch's layers: a router and experts, one for each token.
  struct Switch {
    int64_t experts = 0, capacity = 0;            // of each: tokens of one text
    double jitter = 0.0;                          // of the routers' input while they are trained
    std::vector<uint8_t> in_encoder, in_decoder;  // per layer: it is one
  };

  std::string model_type;                   // config.json's
  int64_t vocab_size = 0, hidden_size = 0;  // the decoder's width
  int64_t encoder_layers = 0, decoder_layers = 0;
  std::optional<Halves> halves;  // nullopt: T5's, from here on to `gated`
  int64_t intermediate_size = 0, num_heads = 0, head_dim = 0;
  int64_t buckets = 32, max_distance = 128;  // of the relative bias
  bool bias_per_layer = false;               // every layer has its own relative bias, not the first one for all
  double norm_eps = 1e-6;
  nn::GluKind activation = nn::GluKind::kRelu;  // of the feed-forward networks
  bool gated = false;                           // these have a gate
  std::optional<Switch> sparse;
  bool tie_word_embeddings = true;  // the head is the embedding
  bool encoder_alone = false;       // there is no decoder (T5EncoderModel)
  bool scale_output = true;         // the decoder's states are divided by sqrt(d) before the head
  int64_t start_id = 0;             // what a decoder's text begins with
  std::vector<int64_t> eos_ids;     // end an answer
};

/// What an encoder-decoder keeps of a text: keys and values of its answer, and those made of its source.
class Seq2SeqMemory : public Memory {
 public:
  Seq2SeqMemory(nn::KvCache of_answers, nn::SourceCache of_sources)
      : answers(std::move(of_answers)), sources(std::move(of_sources)) {}
  int64_t sequences() const override { return answers.batch_size(); }
  /// The source's tokens and the answer's; the start token stands in the place of the source's last one.
  int64_t length(int64_t b) const override;
  int64_t token_bytes() const override;
  void truncate(int64_t b, int64_t length) override;

  nn::KvCache answers;
  nn::SourceCache sources;

 protected:
  void keep_sequences(const std::vector<int64_t>& rows) override;
  void add_sequences(int64_t count) override;
};

/// A model with an encoder. Of a text that begins, the tokens up to its first border (all, without one) are the source:
///
///   s = encoder(t_1 .. t_P)                                     every token sees all
///   h_P, h_P+1, ... = decoder(start, t_P+1, t_P+2, ...; s)      causal, and reads s in every layer
///
/// so that, as in a decoder-only model, row i predicts token i + 1 from the border on, and whoever trains, generates,
/// ranks or scores need not know of the start token. Rows before the border hold the encoder's states (zeros where
/// these are of another width) and predict nothing. A source is read as a whole: text that continues a sequence is the
/// decoder's.
class Seq2SeqLM : public SingleModel {
 public:
  /// Builds with uninitialised weights; device kMeta allocates nothing. Throws UsageError for float16.
  Seq2SeqLM(const Seq2SeqConfig& config, const torch::TensorOptions& options);
  ~Seq2SeqLM() override;

  /// Loads every weight: each tensor of the file is used once and each parameter gets one, or DataError lists all that
  /// do not fit. Whether the head is the embedding, the file decides. Copies of the embedding are dropped.
  static std::shared_ptr<Seq2SeqLM> load(const formats::Checkpoint& checkpoint, const LoadOptions& options);

  const Seq2SeqConfig& config() const { return config_; }
  const Facts& facts() const override { return facts_; }
  const nn::Head& head() const override { return *head_; }
  nn::Sites& sites() override { return sites_; }
  nn::Needs needs() const override;
  OrderedJson sizes() const override;
  void initialize(uint64_t seed) override;
  std::unique_ptr<Memory> memory(int64_t sequences) const override;
  std::vector<nn::Block*> blocks() override;
  std::vector<int64_t> continued(const std::vector<int64_t>& prompt) const override;

  // The encoder.
  int64_t reading_blocks() const override { return config_.encoder_layers; }
  int64_t reading_width() const override { return encoder_.embedding.size(1); }
  bool reads_ahead() const override { return true; }
  void prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const override;
  torch::Tensor embed(const torch::Tensor& tokens) const override;
  torch::Tensor run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) override;
  torch::Tensor finish(const torch::Tensor& h, const torch::Tensor& rows) const override;
  nn::KvCache make_cache(int64_t blocks, int64_t sequences) const override;

  /// The encoder's states behind its norm, [N, d]. `pass` gets the layout.
  torch::Tensor encode(const nn::RaggedBatch& source, nn::Pass& pass);
  /// hidden() with everything checked and filled in; for who joins several models.
  torch::Tensor run(const Text& text, nn::Pass& pass, Memory* memory) override;

 protected:
  torch::Tensor prompt_states(const nn::RaggedBatch& prompts) override;

 private:
  torch::Tensor make_t5(const torch::TensorOptions& options);
  std::shared_ptr<nn::Ffn> make_t5_ffn(bool decodes, int64_t i, int64_t index, const torch::TensorOptions& options);
  Stack make_t5_stack(const char* name, int64_t layers, int64_t first_index, const torch::TensorOptions& options);
  torch::Tensor make_halves(const torch::TensorOptions& options);

  Seq2SeqConfig config_;
  Facts facts_;
  nn::Sites sites_;
  Stack encoder_, decoder_;
  std::unique_ptr<nn::Head> head_;
};

}  // namespace moesaic::models
