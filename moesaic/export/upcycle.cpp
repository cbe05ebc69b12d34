#include "moesaic/export/upcycle.h"

#include <torch/torch.h>

#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/seed.h"
#include "moesaic/export/experts.h"
#include "moesaic/export/merge.h"
#include "moesaic/export/upcycle_switch.h"
#include "moesaic/formats/folder_writer.h"
#include "moesaic/models/registry.h"

namespace moesaic::exporting {
namespace {

constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";
constexpr int64_t kCheckedTokens = 64;

std::unique_ptr<Experts> make_experts(const Upcycling& wanted, const SparseFamily& family,
                                      const std::shared_ptr<const formats::Checkpoint>& base) {
  if (wanted.method == "lora") return make_lora_experts(wanted, family, base);
  if (wanted.method == "mergekit") return make_merged_experts(wanted, family, base);
  return make_copies(wanted, family, base);
}

/// Whether every number of `from` is one of `to`.
bool holds(at::ScalarType to, at::ScalarType from) { return to == from || to == at::kFloat || to == at::kDouble; }

/// One sparse model on its way to its folder.
class Upcycle {
 public:
  Upcycle(const Upcycling& wanted, std::shared_ptr<const formats::Checkpoint> base)
      : base_(std::move(base)),
        family_(sparse_family(base_->config(), where())),
        experts_(make_experts(wanted, family_, base_)) {
    folder_.dtype = output_dtype(wanted.dtype, *base_);
    folder_.config = sparse_config(base_->config(), family_, experts_->sizes(), where());
    folder_.tokenizer = base_->tokenizer_files();
    folder_.generation_config = base_->generation_config();
    layers_ = folder_.config["num_hidden_layers"].get<int64_t>();
    model_width_ = folder_.config["hidden_size"].get<int64_t>();
    declare_beside();
    declare_sparse();
  }

  void write(const std::filesystem::path& out) {
    formats::FolderWriter writer(out, folder_, tensors_);
    for (const std::string& name : beside_) {
      at::Tensor tensor = torch::empty(base_->shape(name), base_->dtype(name));
      base_->read_into(name, tensor);
      writer.put(name, experts_->beside(name, std::move(tensor)));
    }
    for (int64_t layer = 0; layer < layers_; ++layer) write_layer(writer, layer);
    writer.finish();
    bytes_ = writer.bytes();
  }

  Upcycled receipt() const {
    const SparseSizes& sizes = experts_->sizes();
    int64_t all = 0;
    for (const auto& [_, tensor] : tensors_) all += c10::multiply_integers(tensor.shape);
    const int64_t idle = (sizes.experts - sizes.per_token) * layers_ * 3 * sizes.width * model_width_;
    Upcycled made{family_.model_type, layers_, sizes.experts, sizes.per_token, sizes.width,
                  sizes.shared_width, all,     all - idle,    bytes_,          dtype_name(folder_.dtype)};
    made.dequantised = base_->path().extension() == ".gguf";
    const bool rounded = !holds(folder_.dtype, stored_dtype(*base_));
    made.equals_dense = experts_->equals_dense() && !rounded;
    made.promise = experts_->promise() + (rounded ? fmt::format("; but numbers are rounded to {}", made.dtype) : "");
    return made;
  }

 private:
  std::string where() const { return base_->path().string(); }

  /// The base's tensors but its feed-forward networks'. A tied head is the embedding.
  void declare_beside() {
    std::set<std::string> dense;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      for (const Part part : kParts) dense.insert(dense_name(layer, part));
    }
    for (const std::string& name : base_->names()) {
      if (dense.contains(name) || (name == kHead && has_tied_head())) continue;
      beside_.push_back(name);
      tensors_[name] = {base_->shape(name), base_->dtype(name)};
    }
  }

  /// As in loading, the tensors decide when a tied config's file holds a head of its own.
  bool has_tied_head() {
    if (!folder_.config.value("tie_word_embeddings", false)) return false;
    const bool tied = at::equal(base_->tensor(kHead), base_->tensor(kEmbedding));
    folder_.config["tie_word_embeddings"] = tied;
    return tied;
  }

  void declare_sparse() {
    const SparseSizes& sizes = experts_->sizes();
    auto shape = [&](Part part, int64_t width) {
      return part == Part::kDown ? std::vector{model_width_, width} : std::vector{width, model_width_};
    };
    for (int64_t layer = 0; layer < layers_; ++layer) {
      tensors_[family_.router(layer)] = {{sizes.experts, model_width_}};
      for (const Part part : kParts) {
        for (int64_t e = 0; e < sizes.experts; ++e) {
          tensors_[family_.expert(layer, e, part)] = {shape(part, sizes.width)};
        }
        if (family_.shared) tensors_[family_.shared_expert(layer, part)] = {shape(part, sizes.shared_width)};
      }
      if (family_.shared) tensors_[family_.shared_gate(layer)] = {{1, model_width_}};
    }
  }

  void write_layer(formats::FolderWriter& writer, int64_t layer) {
    writer.put(family_.router(layer), experts_->router(layer));
    for (const Part part : kParts) {
      for (int64_t e = 0; e < experts_->sizes().experts; ++e) {
        writer.put(family_.expert(layer, e, part), experts_->expert(layer, part, e));
      }
      if (family_.shared) writer.put(family_.shared_expert(layer, part), experts_->shared(layer, part));
    }
    if (family_.shared) writer.put(family_.shared_gate(layer), experts_->shared_gate(layer));
  }

  std::shared_ptr<const formats::Checkpoint> base_;
  const SparseFamily& family_;
  std::unique_ptr<Experts> experts_;
  formats::ModelFolder folder_;
  std::vector<std::string> beside_;
  formats::Declarations tensors_;
  int64_t layers_ = 0, model_width_ = 0;
  size_t bytes_ = 0;
};

std::vector<int64_t> drawn_ids(int64_t vocab_size, uint64_t seed) {
  auto generator = make_generator(derive_seed(seed, "checked tokens"));
  const at::Tensor ids = torch::randint(vocab_size, {kCheckedTokens}, generator, torch::kLong);
  return {ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + ids.numel()};
}

/// [M, V] float32; an encoder reads half of the text and predicts nothing of it.
at::Tensor logits_of(const std::filesystem::path& path, uint64_t seed) {
  const auto model = models::load_model(*models::open_checkpoint(path));
  nn::Pass pass;
  models::Text text{nn::RaggedBatch::from_sequences({drawn_ids(model->facts().vocab_size, seed)})};
  if (model->reads_ahead()) {
    text.borders = {{kCheckedTokens / 2}};
    text.rows = torch::arange(kCheckedTokens / 2, kCheckedTokens);
  }
  return model->head().logits(model->hidden(text, pass));
}

}  // namespace

at::ScalarType output_dtype(const std::string& name, const formats::Checkpoint& base) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  return stored_dtype(base);
}

Upcycled upcycle(const Upcycling& wanted, const std::filesystem::path& out) {
  const at::NoGradGuard no_grad;
  check_new_folder(out, wanted.inputs());
  const std::shared_ptr<const formats::Checkpoint> base = models::open_checkpoint(wanted.base_model);
  const std::string where = wanted.base_model.string();
  const bool to_switch = base->config().value("model_type", "") == "t5";
  if (!to_switch) {  // refused before anything is read
    MOESAIC_CHECK(!wanted.expert_capacity, UsageError,
                  "expert_capacity: only Switch's experts have one, which a T5 becomes");
    sparse_config(base->config(), sparse_family(base->config(), where), {}, where);
  }
  models::load_model(*base, {.device = torch::kMeta});  // every tensor has its place
  if (to_switch) return upcycle_switch(wanted, base, out);
  Upcycle work(wanted, base);
  work.write(out);
  return work.receipt();
}

double logit_difference(const std::filesystem::path& dense, const std::filesystem::path& sparse, uint64_t seed) {
  const at::NoGradGuard no_grad;
  const at::Tensor expected = logits_of(dense, seed), got = logits_of(sparse, seed);
  return ((got - expected).abs().max() / expected.abs().max()).item<double>();
}

}  // namespace moesaic::exporting
