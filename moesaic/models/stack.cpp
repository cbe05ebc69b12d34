#include "moesaic/models/stack.h"

#include "moesaic/models/single_model.h"
#include "moesaic/moe/sparse_ffn.h"
#include "moesaic/nn/feed_forward.h"
#include "moesaic/nn/kv_cache.h"

namespace moesaic::models {
namespace {

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
      .flat_qk_norm = config.flat_qk_norm,
      .clip = config.clip_qkv,
      .norm_eps = config.rms_norm_eps,
      .norm_offset = config.norm_plus_one ? 1.0 : 0.0,
      .options = {.scale = config.query_scale > 0 ? config.query_scale
                                                  : 1.0 / std::sqrt(static_cast<double>(config.head_dim)),
                  .softcap = config.attention_softcap,
                  .window = sliding ? config.sliding_window : 0},
      .local_rope = sliding && config.rope_local.has_value()};
  result.pre_post_norms = config.pre_post_norms;
  result.residual_scale = config.residual_scale;
  return result;
}

/// The feed-forward half of a layer and its name. `index`: the layer's among all of the model.
std::pair<std::shared_ptr<nn::Ffn>, std::string> make_ffn(const DecoderConfig& config, int64_t layer, int64_t index,
                                                          const torch::TensorOptions& options) {
  const auto& sparse = config.sparse;
  if (!sparse || (!sparse->layer_is_dense.empty() && sparse->layer_is_dense[layer] != 0)) {
    return {nn::FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias, config.activation, index,
                            options)
                .ptr(),
            "mlp"};
  }
  const formats::ExpertNames& names = sparse->names;
  const moe::SparseFfnConfig wanted{.hidden_size = config.hidden_size,
                                    .experts = sparse->experts,
                                    .top_k = sparse->top_k,
                                    .width = sparse->width,
                                    .renormalize = sparse->renormalize,
                                    .shared_width = sparse->shared_width,
                                    .shared_gate = sparse->shared_gate,
                                    .activation = config.activation,
                                    .names = {names.gate_proj, names.up_proj, names.down_proj}};
  return {moe::SparseFfn(wanted, index, options).ptr(), names.block};
}

}  // namespace

void Stack::prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const {
  torch::NoGradGuard no_grad;
  const torch::Device device = embedding.device();
  std::vector<int64_t> positions, segments, lengths;
  for (int64_t b = 0; b < batch.batch_size(); ++b) {
    const int64_t start = pass.cache ? pass.cache->length(b) : 0;
    const int64_t rows = batch.offsets[b + 1] - batch.offsets[b];
    for (int64_t i = 0; i < rows; ++i) positions.push_back(start + i);
    segments.insert(segments.end(), rows, b);
    lengths.push_back(start + rows);
  }
  pass.offsets = batch.offsets;
  pass.positions = torch::tensor(positions, torch::kInt64).to(device);
  pass.segments = torch::tensor(segments, torch::kInt64).to(device);
  if (rope) pass.rope = rope->tables(pass.positions, pass.offsets, lengths);
  if (rope_local) pass.rope_local = rope_local->tables(pass.positions, pass.offsets, lengths);
}

torch::Tensor Stack::embed(const torch::Tensor& tokens) const {
  const torch::Tensor h = at::embedding(embedding, tokens);
  const torch::Tensor scaled = embedding_scale == 1.0 ? h : h * embedding_scale;
  return image_end.defined() ? torch::where((tokens == image_end_id).unsqueeze(1), image_end, scaled) : scaled;
}

Stack make_stack(torch::nn::Module& module, const std::string& path, const DecoderConfig& config, int64_t first_index,
                 const std::function<void(nn::DecoderLayerConfig& layer, int64_t i)>& adapt,
                 const torch::TensorOptions& options, nn::Sites& sites, const torch::Tensor& embedding) {
  Stack stack;
  stack.embedding =
      embedding.defined()
          ? embedding
          : module.register_module("embed_tokens", MatrixModule(config.vocab_size, config.hidden_size, options))
                ->weight;
  const auto layers = module.register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t i = 0; i < config.num_layers; ++i) {
    nn::DecoderLayerConfig wanted = layer_config(config, i);
    if (adapt) adapt(wanted, i);
    auto [ffn, ffn_name] = make_ffn(config, i, first_index + i, options);
    const auto layer = layers->register_module(
        std::to_string(i), nn::DecoderLayer(wanted, std::move(ffn), ffn_name, first_index + i, options));
    layer->add_sites(fmt::format("{}.layers.{}", path, i), sites);
    stack.blocks.push_back(layer.get());
  }
  stack.norm = module.register_module(
      "norm", nn::RmsNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one ? 1.0 : 0.0, options));
  stack.rope = std::make_unique<nn::Rope>(config.rope, config.head_dim);
  if (config.rope_local) stack.rope_local = std::make_unique<nn::Rope>(*config.rope_local, config.head_dim);
  stack.embedding_scale = torch::tensor(config.embedding_scale, torch::kFloat64)
                              .to(stack.embedding.scalar_type())
                              .to(torch::kFloat64)
                              .item<double>();
  return stack;
}

}  // namespace moesaic::models
