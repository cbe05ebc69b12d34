// What every model of one checkpoint has, decoder or encoder-decoder.
#pragma once
#include <torch/torch.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/models/language_model.h"
#include "moesaic/nn/kv_cache.h"

namespace moesaic::models {

struct LoadOptions {
  torch::ScalarType dtype = torch::kFloat32;  // of the frozen weights and activations
  torch::Device device = torch::kCPU;         // where the weights go; kMeta: the file is checked, none is read
  bool quantize_int8 = false;                 // weight-only int8, for decoding
  /// The first blocks alone, without the head: the whole file is checked, this much is read. Of an encoder-decoder the
  /// encoder's.
  int64_t num_blocks = -1;
};

/// A model with weights of its own. Parameters carry the Hugging Face names; none requires grad.
class SingleModel : public torch::nn::Module, public LanguageModel {
 public:
  virtual nn::Sites& sites() = 0;
  /// Its sizes by name, for people.
  virtual OrderedJson sizes() const = 0;
  /// Draws all weights, those of a model made from nothing.
  virtual void initialize(uint64_t seed) = 0;

  // The blocks that read a text, for who joins several models: a decoder's, or the encoder's of an encoder-decoder.
  /// How many there are; they are the first of blocks().
  virtual int64_t reading_blocks() const = 0;
  /// Width of what they make of a row.
  virtual int64_t reading_width() const { return facts().width; }
  /// Whether what they make of a row depends on the rows behind it.
  virtual bool reads_ahead() const { return false; }
  /// Fills offsets, positions, segments and rotary tables of `pass` (positions start at pass.cache's lengths).
  virtual void prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const = 0;
  /// [N] tokens -> [N, d] embeddings.
  virtual torch::Tensor embed(const torch::Tensor& tokens) const = 0;
  /// Runs blocks first .. last-1 on h [N, d], each through pass.forward. `pass` was prepared.
  virtual torch::Tensor run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) = 0;
  /// What stands behind the blocks: the final norm of the rows wanted (undefined = all) of h [N, d].
  virtual torch::Tensor finish(const torch::Tensor& h, const torch::Tensor& rows) const = 0;
  /// For keys and values of the first `blocks` of them; one that reads ahead keeps none.
  virtual nn::KvCache make_cache(int64_t blocks, int64_t sequences) const = 0;

  torch::Device device() const { return facts().device; }
  torch::ScalarType dtype() const { return facts().dtype; }
  std::vector<Part> parts() override { return {{"", &sites()}}; }
  std::vector<torch::Tensor> weights() const override { return parameters(); }

 protected:
  /// A WeightSite for every parameter but `others`.
  void add_parameter_sites(const std::set<std::string>& others);
  /// Gives memory that was freed back to the system: a heap keeps what lies between things still in use.
  static void give_back_freed();
  /// Parameters that a token's way leads through, where it has this share of the experts.
  int64_t active_parameters(double share) const;
  /// Keeps the head in int8 alone. A tied one's floats stay: they are the embedding.
  void quantize_head(nn::Head& head, bool tied);
};

/// A module that is one matrix: an embedding, a head.
struct MatrixModuleImpl : torch::nn::Module {
  MatrixModuleImpl(int64_t rows, int64_t columns, const torch::TensorOptions& options) {
    weight = register_parameter("weight", torch::empty({rows, columns}, options), /*requires_grad=*/false);
  }
  torch::Tensor weight;
};
TORCH_MODULE(MatrixModule);

/// Reads every parameter of `module`; its name in the checkpoint is `prefix` and its own.
void read_weights(const formats::Checkpoint& checkpoint, torch::nn::Module& module, const std::string& prefix);

}  // namespace moesaic::models
