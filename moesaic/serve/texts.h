// What is asked about texts that nobody answers: their tokens and their vectors, in vLLM's and OpenAI's shapes.
#pragma once
#include "moesaic/serve/completions.h"
#include "moesaic/serve/service.h"

namespace moesaic::serve {

// Each throws ApiError for a body that is not as it should be.

/// {"prompt"} or {"messages"} -> {"count", "max_model_len", "tokens"}.
OrderedJson tokenize(const OrderedJson& body, const Surroundings& around);
/// {"tokens"} -> {"prompt"}.
OrderedJson detokenize(const OrderedJson& body, const Surroundings& around);
OrderedJson tokenizer_info(const Surroundings& around);
/// The mean over a text's final hidden states, of length 1 unless it is asked for otherwise.
OrderedJson embeddings(const OrderedJson& body, const std::string& path_model, const Surroundings& around,
                       models::LanguageModel& language_model, Service& service);

}  // namespace moesaic::serve
