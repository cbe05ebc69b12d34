// The sentence embedding that routers with input `sentence` read when no column gives one.
#pragma once
#include "moesaic/models/causal_lm.h"

namespace moesaic::generate {

/// e_b = mean over the rows of prompt b of the frozen model's final-norm hidden states (adapters disabled).
/// Returns [B, d] float32, without a graph.
torch::Tensor sentence_embeddings(models::CausalLM& model, const nn::RaggedBatch& prompts);

}  // namespace moesaic::generate
