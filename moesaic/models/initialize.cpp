#include "moesaic/models/initialize.h"

#include "moesaic/base/seed.h"

namespace moesaic::models {

void initialize(CausalLM& model, uint64_t seed) { initialize(model, model.config(), seed); }

void initialize(torch::nn::Module& model, const DecoderConfig& config, uint64_t seed) {
  torch::NoGradGuard no_grad;
  at::Generator generator = make_generator(seed);
  const std::string down = fmt::format("{}.weight", config.sparse ? config.sparse->names.down_proj : "down_proj");
  const double residual = 1.0 / std::sqrt(2.0 * static_cast<double>(config.num_layers));
  for (auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    torch::Tensor& parameter = item.value();
    if (parameter.dim() == 1) {
      parameter.fill_(name.ends_with(".bias") || config.norm_plus_one ? 0.0 : 1.0);
      continue;
    }
    double deviation = 1.0 / std::sqrt(static_cast<double>(parameter.size(1)));
    if (name.ends_with("o_proj.weight") || name.ends_with(down)) deviation *= residual;
    if (name.ends_with("embed_tokens.weight")) deviation = config.tie_word_embeddings ? 0.02 : 0.1;
    if (name.starts_with("lm_head.")) deviation = 0.02;
    parameter.copy_(torch::empty(parameter.sizes(), torch::kFloat32).normal_(0.0, deviation, generator));
  }
}

}  // namespace moesaic::models
