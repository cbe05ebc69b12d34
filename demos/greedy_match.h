// Exact match of greedy answers without generating them: one forward pass per batch.
#pragma once
#include <functional>

#include "moesaic/data/example.h"
#include "moesaic/models/language_model.h"

namespace moesaic::demos {

/// result[i] = 1 when greedy decoding from example i's prompt would give its target token for token (end of turn
/// included): every target token is the most likely one given those before it.
/// `max_batch_tokens` bounds a batch; `on_progress` is told how many examples are done.
std::vector<uint8_t> greedy_matches(models::LanguageModel& model, const std::vector<data::Example>& examples,
                                    int64_t max_batch_tokens = 2048,
                                    const std::function<void(int64_t)>& on_progress = nullptr);

}  // namespace moesaic::demos
