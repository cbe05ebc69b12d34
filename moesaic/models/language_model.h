// What trainers, generation, evaluation and servers know of a model: text in, final hidden states and a head out.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/nn/block.h"
#include "moesaic/nn/head.h"
#include "moesaic/nn/pass.h"
#include "moesaic/nn/site.h"

namespace moesaic::models {

/// What is the same for every text.
struct Facts {
  std::string model_type;  // of config.json; of a composition its anchor's
  int64_t vocab_size = 0, width = 0, blocks = 0;
  std::vector<int64_t> eos_ids;
  torch::Device device = torch::kCPU;
  torch::ScalarType dtype = torch::kFloat32;  // of frozen weights and activations
  bool has_dropout = false;                   // it has sites where Pass::dropout acts
};

/// A ragged batch and what is known about it.
struct Text {
  nn::RaggedBatch tokens;
  nn::Borders borders{};                        // where prompts end; an encoder reads what stands before the first
  torch::Tensor sentence{};                     // [B, d_e] for routers that read a data column's vectors
  std::vector<std::vector<int64_t>> prompts{};  // what sentence embeddings are made of; empty = the tokens
  torch::Tensor mixture{};                      // [B, A]: weight of every attached adapter; undefined = 1
  torch::Tensor rows{};                         // [M] int64: the rows wanted; undefined = all N
};

/// What a model keeps of the texts it is in the middle of, per sequence. Sequences join and leave.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual int64_t sequences() const = 0;
  /// Tokens of sequence b.
  virtual int64_t length(int64_t b) const = 0;
  /// Bytes that one more token of a sequence takes, at most.
  virtual int64_t token_bytes() const = 0;
  /// Drops everything of sequence b behind its first `length` tokens; all of it where these can't be had alone (half of
  /// what an encoder has read). length() tells.
  virtual void truncate(int64_t b, int64_t length) = 0;
  /// Keeps the sequences `rows` in that order; they are moved, only repeats are copied.
  void keep(const std::vector<int64_t>& rows);
  /// `count` empty sequences join behind the others; their first text brings their sentence vectors and mixture.
  void add(int64_t count);

  // What LanguageModel::hidden keeps of each sequence; undefined where no text brought one.
  torch::Tensor sentence;  // [B, d_e] float32
  torch::Tensor mixture;   // [B, A] float32

 protected:
  virtual void keep_sequences(const std::vector<int64_t>& rows) = 0;
  virtual void add_sequences(int64_t count) = 0;
};

/// Makes the vectors of prompts that routers read, in place of the model itself.
class SentenceEncoder {
 public:
  virtual ~SentenceEncoder() = default;
  /// Of prompts of the model's token ids: [B, d_e] float32 on the CPU.
  virtual torch::Tensor vectors(const std::vector<std::vector<int64_t>>& prompts) = 0;
};

/// A part of a model with sites of its own: the model itself, or a member of a composition.
struct Part {
  std::string place;  // "" of a single model; "anchor", "augmenting.0" of a composition
  nn::Sites* sites;
};

/// A decoder, an encoder-decoder or a composition of models.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  virtual const Facts& facts() const = 0;
  virtual const nn::Head& head() const = 0;
  virtual std::unique_ptr<Memory> memory(int64_t sequences) const = 0;
  /// Tokens up to which a text gives the same in parts, through a Memory, as at once: dynamic RoPE turns every key of a
  /// longer one by the length of the whole.
  virtual int64_t exact_memory() const { return INT64_MAX; }

  /// Final hidden states behind the last norm, [M, d]. With `memory` the text continues what is remembered (no
  /// gradient); a sequence may have no new row. Routers that read sentence embeddings get them here: text.sentence, or
  /// what `memory` holds of a sequence that has begun, or the mean of the frozen model's hidden states over its prompt
  /// (text.prompts, else its tokens; adapters disabled). Memory keeps them, as it keeps text.mixture.
  /// Throws DataError for ids outside of the vocabulary, UsageError when a router's vectors are missing.
  torch::Tensor hidden(const Text& text, nn::Pass& pass, Memory* memory = nullptr);

  /// Sites by part; the first part is where attach() puts adapters.
  virtual std::vector<Part> parts() = 0;
  /// Every block that runs, for estimates.
  virtual std::vector<nn::Block*> blocks() = 0;
  /// All frozen weights, for counts and estimates.
  virtual std::vector<torch::Tensor> weights() const = 0;
  /// Bytes that training `tokens` tokens keeps for the backward pass; checkpointing: of blocks their inputs alone, and
  /// the largest block whole.
  virtual int64_t activation_bytes(int64_t tokens, bool checkpointing);

  /// Bytes of gradients that the backward pass of the largest block holds at its widest, beside what was saved.
  int64_t scratch_bytes(int64_t tokens);

  /// What a composition is made of, null of a single model:
  /// {"num_heads", "anchor": {...}, "augmenting": [...], "connections": [{"augmenting", "aug", "anchor"}]}.
  virtual OrderedJson structure() const { return nullptr; }
  /// The text that an answer to `prompt` goes on, as a penalty on repetitions sees it: the prompt.
  virtual std::vector<int64_t> continued(const std::vector<int64_t>& prompt) const { return prompt; }

  /// The texts of a source's token ids (nn::ReadingRecord).
  virtual std::vector<std::string> source_texts(int64_t source, const std::vector<int64_t>& ids) const;

  /// What makes the vectors that routers of adapters attached from here on read.
  void read_sentences_with(std::shared_ptr<SentenceEncoder> encoder) { sentence_encoder_ = std::move(encoder); }
  /// Takes an adapter made for the first part's sites under its name; the model owns it from here on. Its column of
  /// `mixture` is its number. Throws UsageError when the name is taken, or when one adapter reads sentence embeddings
  /// of the model and another of a column, or of a sentence encoder that there is not. The sequences of `memory` give
  /// it weight 0.
  void attach(const std::string& name, std::shared_ptr<nn::Attachment> attachment, Memory* memory = nullptr);
  /// Gives the adapter `name` back; those behind it move up a column, in `memory` too. Throws as column() does.
  std::shared_ptr<nn::Attachment> detach(const std::string& name, Memory* memory = nullptr);
  const std::vector<std::shared_ptr<nn::Attachment>>& attachments() const { return attachments_; }
  /// Column of the adapter `name`; throws UsageError with the names there are.
  int64_t column(const std::string& name) const;
  /// What all attached adapters need together, carried ones of members included.
  virtual nn::Needs needs() const;

 protected:
  /// hidden() with everything checked and filled in.
  virtual torch::Tensor run(const Text& text, nn::Pass& pass, Memory* memory) = 0;
  /// The frozen final hidden states of prompts, [N, d]: what sentence embeddings are means of. Adapters are disabled.
  virtual torch::Tensor prompt_states(const nn::RaggedBatch& prompts);
  /// What these consecutive blocks of a model of such facts keep; see activation_bytes.
  static int64_t saved_bytes(const std::vector<nn::Block*>& blocks, const Facts& facts, int64_t tokens,
                             bool checkpointing);
  /// Derived destructors call it first: slots die with the blocks.
  void detach_all();

 private:
  torch::Tensor sentence_vectors(const Text& text, const Memory* memory);
  torch::Tensor mixture_rows(const Text& text, const Memory* memory) const;

  std::vector<std::shared_ptr<nn::Attachment>> attachments_;
  std::shared_ptr<SentenceEncoder> sentence_encoder_;
};

}  // namespace moesaic::models
