#include "moesaic/export/upcycle_switch.h"

#include <torch/torch.h>

#include "moesaic/export/experts.h"
#include "moesaic/formats/folder_writer.h"
#include "moesaic/models/registry.h"

namespace moesaic::exporting {
namespace {

constexpr const char *kDense = ".DenseReluDense.", *kEmbedding = "shared.weight", *kHead = "lm_head.weight";
constexpr int64_t kEvery = 2;      // of so many layers one has experts
constexpr int64_t kCapacity = 64;  // transformers' default

/// A tensor of a sparse layer's network.
struct Matrix {
  std::string layer;  // "encoder.block.1.layer.1"
  int64_t number;     // of the layer among both halves' sparse ones
  Part part;          // wi is kGate
};

class SwitchUpcycle {
 public:
  SwitchUpcycle(const Upcycling& wanted, std::shared_ptr<const formats::Checkpoint> base)
      : wanted_(wanted), base_(std::move(base)), dense_(models::parse_seq2seq_config(base_->config(), where())) {
    check();
    folder_.config = config();
    folder_.dtype = output_dtype(wanted.dtype, *base_);
    folder_.tokenizer = base_->tokenizer_files();
    folder_.generation_config = base_->generation_config();
    declare();
  }

  void write(const std::filesystem::path& out) {
    formats::FolderWriter writer(out, folder_, tensors_);
    for (const auto& [stored, name] : beside_) writer.put(name, read(stored));
    for (const auto& [stored, matrix] : sparse_) {
      const at::Tensor dense = read(stored);
      for (int64_t e = 0; e < wanted_.num_experts; ++e) writer.put(expert(matrix, e), copy(dense, matrix, e));
      if (matrix.part == Part::kGate) {
        writer.put(router(matrix),
                   drawn_rows(wanted_, "router", matrix.number, wanted_.num_experts, dense_.hidden_size));
      }
    }
    writer.finish();
    bytes_ = writer.bytes();
  }

  Upcycled receipt() const {
    int64_t all = 0, experts = 0;
    for (const auto& [name, tensor] : tensors_) {
      const int64_t numbers = c10::multiply_integers(tensor.shape);
      all += numbers;
      if (name.find(".experts.") != std::string::npos) experts += numbers;
    }
    return {.family = "switch_transformers",
            .layers = std::ssize(sparse_) / 2,
            .experts = wanted_.num_experts,
            .experts_per_token = 1,
            .expert_width = dense_.intermediate_size,
            .parameters = all,
            .active_parameters = all - experts / wanted_.num_experts * (wanted_.num_experts - 1),
            .bytes = bytes_,
            .dtype = dtype_name(folder_.dtype),
            .routers_learn = true,
            .promise =
                "near the dense model: a copy's weight is its probability, which a router drawn so gives "
                "only about 1/E"};
  }

 private:
  std::string where() const { return base_->path().string(); }

  void check() const {
    MOESAIC_CHECK(wanted_.method == "copy", UsageError,
                  "method: got {} for a T5, expected copy: Switch's experts are made of its networks alone",
                  wanted_.method);
    MOESAIC_CHECK(wanted_.experts_per_token == 1, UsageError,
                  "experts_per_token: got {}, expected 1: Switch has one for each token", wanted_.experts_per_token);
    MOESAIC_CHECK(!dense_.gated, UsageError,
                  "{}: feed_forward_proj: got a gated network, but transformers' Switch has none with a gate; T5 1.0 "
                  "fits, T5 1.1 and Flan-T5 don't",
                  where());
    for (const int64_t layers : {dense_.encoder_layers, dense_.decoder_layers}) {
      MOESAIC_CHECK(layers >= kEvery, UsageError, "{}: got a half of {} layers, expected 2 or more", where(), layers);
    }
    MOESAIC_CHECK(dense_.scale_output == tied(), UsageError,
                  "{}: scale_decoder_outputs: got {} with a head that {}, but Switch's states are divided where the "
                  "head is the embedding, and nowhere else",
                  where(), dense_.scale_output, tied() ? "is the embedding" : "has its own numbers");
  }

  /// As in loading, the tensors decide.
  bool tied() const {
    return !base_->contains(kHead) || !base_->contains(kEmbedding) ||
           at::equal(base_->tensor(kHead), base_->tensor(kEmbedding));
  }

  static bool is_sparse(int64_t layer) { return layer % kEvery == 1; }

  Json config() const {
    Json config = base_->config();
    for (const char* key : {"feed_forward_proj", "is_gated_act", "task_specific_params", "scale_decoder_outputs"}) {
      config.erase(key);
    }
    config["model_type"] = "switch_transformers";
    config["architectures"] = {"SwitchTransformersForConditionalGeneration"};
    config["d_model"] = dense_.hidden_size;
    config["d_ff"] = dense_.intermediate_size;
    config["num_heads"] = dense_.num_heads;
    config["num_layers"] = dense_.encoder_layers;
    config["num_decoder_layers"] = dense_.decoder_layers;
    config["num_sparse_encoder_layers"] = sparse_layers(dense_.encoder_layers);
    config["num_sparse_decoder_layers"] = sparse_layers(dense_.decoder_layers);
    config["dense_act_fn"] = base_->config().value("feed_forward_proj", "relu");
    config["num_experts"] = wanted_.num_experts;
    config["expert_capacity"] = wanted_.expert_capacity.value_or(kCapacity);
    config["router_bias"] = false;
    config["router_jitter_noise"] = 0.01;
    config["tie_word_embeddings"] = tied();
    return config;
  }

  /// The number from which transformers' rule, one of layers / number, gives every second layer.
  static int64_t sparse_layers(int64_t layers) { return layers / kEvery; }

  void declare() {
    for (const std::string& name : base_->names()) {
      if (name == kHead && tied()) continue;
      const size_t network = name.find(kDense);
      const int64_t layer = network == std::string::npos ? -1 : layer_of(name);
      if (layer < 0 || !is_sparse(layer)) {
        const std::string renamed = layer < 0 ? name : replaced(name, kDense, ".mlp.");
        beside_[name] = renamed;
        tensors_[renamed] = {base_->shape(name), base_->dtype(name)};
        continue;
      }
      const int64_t number = layer / kEvery + (name.starts_with("decoder.") ? dense_.encoder_layers : 0);
      const Matrix matrix{name.substr(0, network), number, name.ends_with(".wo.weight") ? Part::kDown : Part::kGate};
      sparse_[name] = matrix;
      for (int64_t e = 0; e < wanted_.num_experts; ++e) tensors_[expert(matrix, e)] = {base_->shape(name)};
      if (matrix.part == Part::kGate) tensors_[router(matrix)] = {{wanted_.num_experts, dense_.hidden_size}};
    }
  }

  /// Of "encoder.block.<layer>. ...".
  static int64_t layer_of(const std::string& name) {
    return std::stoll(name.substr(name.find(".block.") + std::string_view(".block.").size()));
  }
  static std::string replaced(std::string text, std::string_view from, std::string_view to) {
    return text.replace(text.find(from), from.size(), to);
  }

  static std::string router(const Matrix& matrix) { return matrix.layer + ".mlp.router.classifier.weight"; }
  static std::string expert(const Matrix& matrix, int64_t e) {
    return fmt::format("{}.mlp.experts.expert_{}.{}.weight", matrix.layer, e, matrix.part == Part::kDown ? "wo" : "wi");
  }

  at::Tensor copy(const at::Tensor& dense, const Matrix& matrix, int64_t e) const {
    at::Tensor own = dense;
    if (wanted_.noise > 0) own = with_noise(own, wanted_.noise, wanted_.seed, matrix.number, matrix.part, e);
    if (matrix.part == Part::kDown) own = own.to(torch::kFloat32) * static_cast<double>(wanted_.num_experts);
    return own;
  }

  at::Tensor read(const std::string& name) const {
    at::Tensor tensor = torch::empty(base_->shape(name), base_->dtype(name));
    base_->read_into(name, tensor);
    return tensor;
  }

  Upcycling wanted_;
  std::shared_ptr<const formats::Checkpoint> base_;
  models::Seq2SeqConfig dense_;
  formats::ModelFolder folder_;
  std::map<std::string, std::string> beside_;  // the base's name and the sparse model's
  std::map<std::string, Matrix> sparse_;       // by the base's name
  formats::Declarations tensors_;
  size_t bytes_ = 0;
};

}  // namespace

Upcycled upcycle_switch(const Upcycling& wanted, const std::shared_ptr<const formats::Checkpoint>& base,
                        const std::filesystem::path& out) {
  SwitchUpcycle work(wanted, base);
  work.write(out);
  return work.receipt();
}

}  // namespace moesaic::exporting
