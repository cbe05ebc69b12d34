#include "moesaic/models/causal_lm.h"

#include "moesaic/base/check.h"
#include "moesaic/nn/decoder_layer.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::models {
namespace {

constexpr size_t kShownNames = 20;  // per kind of error

/// A module that is one matrix: embed_tokens, lm_head.
struct MatrixImpl : torch::nn::Module {
  MatrixImpl(int64_t rows, int64_t columns, const torch::TensorOptions& options) {
    weight = register_parameter("weight", torch::empty({rows, columns}, options), /*requires_grad=*/false);
  }
  torch::Tensor weight;
};
TORCH_MODULE(Matrix);

nn::DecoderLayerConfig layer_config(const DecoderConfig& config, int64_t layer) {
  const bool sliding =
      config.sliding_window > 0 && (config.layer_is_sliding.empty() || config.layer_is_sliding[layer] != 0);
  nn::DecoderLayerConfig result;
  result.attention = {
      .hidden_size = config.hidden_size,
      .heads = config.num_heads,
      .kv_heads = config.num_kv_heads,
      .head_dim = config.head_dim,
      .qkv_bias = config.qkv_bias,
      .o_bias = config.o_bias,
      .qk_norm = config.qk_norm,
      .norm_eps = config.rms_norm_eps,
      .norm_offset = config.norm_plus_one ? 1.0 : 0.0,
      .options = {.scale = config.query_scale > 0 ? config.query_scale
                                                  : 1.0 / std::sqrt(static_cast<double>(config.head_dim)),
                  .softcap = config.attention_softcap,
                  .window = sliding ? config.sliding_window : 0},
      .local_rope = sliding && config.rope_local.has_value()};
  result.intermediate_size = config.intermediate_size;
  result.mlp_bias = config.mlp_bias;
  result.activation = config.activation;
  result.pre_post_norms = config.pre_post_norms;
  return result;
}

std::string shape_text(at::IntArrayRef shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

std::string listed(const char* title, const std::vector<std::string>& names) {
  if (names.empty()) return "";
  const size_t shown = std::min(names.size(), kShownNames);
  std::string text = fmt::format("\n  {} ({}):\n    {}", title, names.size(),
                                 fmt::join(names.begin(), names.begin() + static_cast<int64_t>(shown), "\n    "));
  if (shown < names.size()) text += fmt::format("\n    and {} more", names.size() - shown);
  return text;
}

/// Old checkpoints store the rotary frequencies, which follow from the config.
bool is_derived_buffer(const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); }

/// Throws DataError listing every tensor of the file that has no place and every parameter without a fitting tensor.
void check_tensors(const formats::Checkpoint& checkpoint, const CausalLM& model, bool ignore_head) {
  std::vector<std::string> missing, unexpected, misshapen;
  const auto parameters = model.named_parameters();
  for (const auto& item : parameters) {
    if (!checkpoint.contains(item.key())) {
      missing.push_back(item.key());
    } else if (const auto shape = checkpoint.shape(item.key()); item.value().sizes() != at::IntArrayRef(shape)) {
      misshapen.push_back(
          fmt::format("{}: got {}, expected {}", item.key(), shape_text(shape), shape_text(item.value().sizes())));
    }
  }
  for (const std::string& name : checkpoint.names()) {
    if (is_derived_buffer(name) || (ignore_head && name == "lm_head.weight")) continue;
    if (parameters.find(name) == nullptr) unexpected.push_back(name);
  }
  MOESAIC_CHECK(missing.empty() && unexpected.empty() && misshapen.empty(), DataError,
                "{}: the weights do not fit config.json (model_type {}):{}{}{}", checkpoint.path().string(),
                model.config().model_type, listed("missing", missing), listed("unexpected", unexpected),
                listed("of the wrong shape", misshapen));
}

}  // namespace

struct CausalLM::Impl {
  Matrix embed_tokens{nullptr}, lm_head{nullptr};  // lm_head only when untied
  std::vector<nn::DecoderLayer> layers;
  nn::RmsNorm norm{nullptr};
  std::unique_ptr<nn::Rope> rope, rope_local;
  double embedding_scale = 1.0;               // in the weights' precision
  torch::Tensor head_quantized, head_scales;  // int8 [V, d], float32 [V]
};

CausalLM::CausalLM(const DecoderConfig& config, const torch::TensorOptions& options)
    : config_(config), impl_(std::make_unique<Impl>()) {
  auto model = std::make_shared<torch::nn::Module>();
  auto layers = std::make_shared<torch::nn::Module>();
  impl_->embed_tokens = model->register_module("embed_tokens", Matrix(config.vocab_size, config.hidden_size, options));
  model->register_module("layers", layers);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string index = std::to_string(i);
    impl_->layers.push_back(layers->register_module(index, nn::DecoderLayer(layer_config(config, i), i, options)));
    impl_->layers.back()->add_sites("model.layers." + index, sites_);
  }
  impl_->norm = model->register_module(
      "norm", nn::RmsNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one ? 1.0 : 0.0, options));
  register_module("model", model);
  if (!config.tie_word_embeddings) {
    impl_->lm_head = register_module("lm_head", Matrix(config.vocab_size, config.hidden_size, options));
  }
  impl_->rope = std::make_unique<nn::Rope>(config.rope, config.head_dim);
  if (config.rope_local) impl_->rope_local = std::make_unique<nn::Rope>(*config.rope_local, config.head_dim);
  impl_->embedding_scale =
      torch::tensor(config.embedding_scale, torch::kFloat64).to(dtype()).to(torch::kFloat64).item<double>();
  sites_.has_qk_norm = config.qk_norm;
  sites_.model_type = config.model_type;
}

CausalLM::~CausalLM() = default;

std::shared_ptr<CausalLM> CausalLM::load(const formats::Checkpoint& checkpoint, const LoadOptions& options) {
  torch::NoGradGuard no_grad;
  DecoderConfig config = parse_decoder_config(checkpoint.config(), checkpoint.path().string());
  // A tied config whose file holds a head of its own: the tensors decide.
  const bool stored_head = config.tie_word_embeddings && checkpoint.contains("lm_head.weight") &&
                           checkpoint.contains("model.embed_tokens.weight");
  if (stored_head && !at::equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))) {
    config.tie_word_embeddings = false;
  }
  // Nothing is allocated before every shape fits.
  check_tensors(checkpoint, CausalLM(config, torch::TensorOptions(torch::kMeta).dtype(options.dtype)),
                config.tie_word_embeddings && stored_head);
  if (options.num_blocks >= 0) {
    config.num_layers = std::min(config.num_layers, options.num_blocks);
    config.tie_word_embeddings = true;  // no head of its own
  }

  auto model = std::make_shared<CausalLM>(config, torch::TensorOptions(options.device).dtype(options.dtype));
  auto read = [&](torch::nn::Module& module, const std::string& prefix) {
    for (auto& item : module.named_parameters()) {
      torch::Tensor& parameter = item.value();
      if (parameter.is_cpu()) {
        checkpoint.read_into(prefix + item.key(), parameter);
      } else {
        torch::Tensor staged = torch::empty(parameter.sizes(), parameter.options().device(torch::kCPU));
        checkpoint.read_into(prefix + item.key(), staged);
        parameter.copy_(staged);
      }
    }
  };
  Impl& impl = *model->impl_;
  read(*impl.embed_tokens, "model.embed_tokens.");
  for (size_t i = 0; i < impl.layers.size(); ++i) {
    read(*impl.layers[i], fmt::format("model.layers.{}.", i));
    if (options.quantize_int8) impl.layers[i]->quantize_int8();  // layer by layer: only one is held twice
  }
  read(*impl.norm, "model.norm.");
  if (!impl.lm_head.is_empty()) read(*impl.lm_head, "lm_head.");
  if (options.quantize_int8)
    std::tie(impl.head_quantized, impl.head_scales) = nn::quantize_rows_int8(model->head_weight());
  return model;
}

torch::Device CausalLM::device() const { return impl_->embed_tokens->weight.device(); }
torch::ScalarType CausalLM::dtype() const { return impl_->embed_tokens->weight.scalar_type(); }

void CausalLM::prepare(const nn::RaggedBatch& batch, nn::ForwardContext& context) const {
  torch::NoGradGuard no_grad;
  const int64_t count = batch.batch_size();
  if (context.cache) {
    MOESAIC_CHECK(context.cache->batch_size() == count, ShapeError, "KV cache: got {} sequences, expected {}",
                  context.cache->batch_size(), count);
  }
  const auto [least, most] = batch.tokens.aminmax();
  for (const int64_t id : {least.item<int64_t>(), most.item<int64_t>()}) {
    MOESAIC_CHECK(id >= 0 && id < config_.vocab_size, DataError, "token id: got {}, expected 0 to {} (the vocabulary)",
                  id, config_.vocab_size - 1);
  }
  std::vector<int64_t> positions, segments, lengths;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t start = context.cache ? context.cache->length(b) : 0;
    const int64_t rows = batch.offsets[b + 1] - batch.offsets[b];
    for (int64_t i = 0; i < rows; ++i) positions.push_back(start + i);
    segments.insert(segments.end(), rows, b);
    lengths.push_back(start + rows);
  }
  context.offsets = batch.offsets;
  context.positions = torch::tensor(positions, torch::kInt64).to(device());
  context.segments = torch::tensor(segments, torch::kInt64).to(device());
  context.rope = impl_->rope->tables(context.positions, context.offsets, lengths);
  if (impl_->rope_local) context.rope_local = impl_->rope_local->tables(context.positions, context.offsets, lengths);
}

torch::Tensor CausalLM::embed(const torch::Tensor& tokens) const {
  torch::Tensor h = at::embedding(impl_->embed_tokens->weight, tokens);
  return impl_->embedding_scale == 1.0 ? h : h * impl_->embedding_scale;
}

torch::Tensor CausalLM::run_layers(torch::Tensor h, int64_t first, int64_t last, nn::ForwardContext& context) {
  for (int64_t i = first; i < last; ++i) h = impl_->layers[i]->forward(h, context);
  return h;
}

torch::Tensor CausalLM::final_norm(const torch::Tensor& h) const { return impl_->norm->forward(h); }

torch::Tensor CausalLM::hidden_states(const nn::RaggedBatch& batch, nn::ForwardContext& context) {
  prepare(batch, context);
  torch::Tensor h = final_norm(run_layers(embed(batch.tokens), 0, config_.num_layers, context));
  if (context.cache) {
    std::vector<int64_t> counts;
    for (int64_t b = 0; b < batch.batch_size(); ++b) counts.push_back(batch.offsets[b + 1] - batch.offsets[b]);
    context.cache->commit(counts);
  }
  return h;
}

torch::Tensor CausalLM::logits(const torch::Tensor& hidden) const {
  torch::Tensor z = impl_->head_quantized.defined()
                        ? nn::linear_rows_int8(hidden, impl_->head_quantized, impl_->head_scales, {})
                        : nn::linear_rows(hidden, head_weight(), {});
  z = z.to(torch::kFloat32);
  return config_.final_softcap > 0 ? at::tanh(z / config_.final_softcap) * config_.final_softcap : z;
}

const torch::Tensor& CausalLM::head_weight() const {
  return impl_->lm_head.is_empty() ? impl_->embed_tokens->weight : impl_->lm_head->weight;
}

nn::KvCache CausalLM::make_cache(int64_t batch_size) const {
  return nn::KvCache(config_.num_layers, config_.num_kv_heads, config_.head_dim, batch_size,
                     torch::TensorOptions(device()).dtype(dtype()));
}

}  // namespace moesaic::models
