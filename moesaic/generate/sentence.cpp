#include "moesaic/generate/sentence.h"

namespace moesaic::generate {

torch::Tensor sentence_embeddings(models::CausalLM& model, const nn::RaggedBatch& prompts) {
  torch::NoGradGuard no_grad;
  nn::AdapterDisabled disabled;
  nn::ForwardContext context;
  const torch::Tensor hidden = model.hidden_states(prompts, context);
  std::vector<torch::Tensor> means;
  for (int64_t b = 0; b < prompts.batch_size(); ++b) {
    means.push_back(
        hidden.slice(0, prompts.offsets[b], prompts.offsets[b + 1]).mean(0, /*keepdim=*/false, torch::kFloat32));
  }
  return torch::stack(means);
}

}  // namespace moesaic::generate
