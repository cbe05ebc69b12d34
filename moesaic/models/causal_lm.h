// Decoder-only language models of every family.
#pragma once
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "moesaic/formats/model_folder.h"
#include "moesaic/models/decoder_config.h"
#include "moesaic/models/single_model.h"
#include "moesaic/models/stack.h"
#include "moesaic/nn/kv_cache.h"
#include "moesaic/nn/learner.h"

namespace moesaic::models {

/// A key-value cache as a Memory.
class CacheMemory : public Memory {
 public:
  explicit CacheMemory(nn::KvCache of) : cache(std::move(of)) {}
  int64_t sequences() const override { return cache.batch_size(); }
  int64_t length(int64_t b) const override { return cache.length(b); }
  int64_t token_bytes() const override { return cache.token_bytes(); }
  void truncate(int64_t b, int64_t length) override { cache.truncate(b, length); }

  nn::KvCache cache;

 protected:
  void keep_sequences(const std::vector<int64_t>& rows) override { cache.keep(rows); }
  void add_sequences(int64_t count) override { cache.add(count); }
};

/// A decoder-only model. Parameters carry the Hugging Face names; none requires grad.
class CausalLM : public SingleModel {
 public:
  /// Builds with uninitialised weights; device kMeta allocates nothing.
  CausalLM(const DecoderConfig& config, const torch::TensorOptions& options);
  ~CausalLM() override;

  /// Loads every weight: each tensor of the file is used once and each parameter gets one, or DataError lists all that
  /// do not fit.
  static std::shared_ptr<CausalLM> load(const formats::Checkpoint& checkpoint, const LoadOptions& options);

  const DecoderConfig& config() const { return config_; }
  nn::Sites& sites() override { return sites_; }
  OrderedJson sizes() const override;
  void initialize(uint64_t seed) override;

  const Facts& facts() const override { return facts_; }
  const nn::Head& head() const override { return *head_; }
  std::unique_ptr<Memory> memory(int64_t sequences) const override;
  int64_t exact_memory() const override;
  std::vector<nn::Block*> blocks() override { return stack_.blocks; }
  nn::Needs needs() const override;

  int64_t reading_blocks() const override { return config_.num_layers; }
  void prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const override;
  torch::Tensor embed(const torch::Tensor& tokens) const override;
  torch::Tensor run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) override;
  torch::Tensor finish(const torch::Tensor& h, const torch::Tensor& rows) const override;
  nn::KvCache make_cache(int64_t blocks, int64_t sequences) const override;

 protected:
  torch::Tensor run(const Text& text, nn::Pass& pass, Memory* memory) override;

 private:
  void add_weight_sites();

  DecoderConfig config_;
  Facts facts_;
  nn::Sites sites_;
  Stack stack_;
  std::unique_ptr<nn::Head> head_, own_head_;  // own_head_: while an adapter has put another in its place
};

/// The weights of a model, trained: full fine-tuning, or of parts of it. Folders are those of Hugging Face.
class AllWeights : public nn::Learner {
 public:
  /// `folder` holds what save() writes beside the weights: config, tokenizer, chat template, dtype. `parts`: what is
  /// trained, of kTrainableParts; none = all. Throws UsageError for a part that the model has not.
  AllWeights(std::shared_ptr<SingleModel> model, formats::ModelFolder folder, std::vector<std::string> parts = {});
  std::vector<nn::Parameter> parameters() override;
  void save(const std::filesystem::path& dir) const override;
  void load(const std::filesystem::path& dir) override;

 private:
  std::shared_ptr<SingleModel> model_;
  formats::ModelFolder folder_;
  std::vector<std::string> parts_;
};

/// What AllWeights may train apart: routers of sparse models, their experts, attention, dense and shared feed-forward
/// networks, norms, embedding and head.
inline constexpr const char* kTrainableParts[] = {"router", "experts", "attention", "mlp", "norms", "embeddings"};

}  // namespace moesaic::models
