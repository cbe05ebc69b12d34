// Router rows that point where an expert's prompts lie, as mergekit-moe makes them.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "moesaic/export/upcycling.h"
#include "moesaic/formats/checkpoint.h"

namespace moesaic::exporting {

/// The gates of `sources`, [L, sources, d] float32, as `mode` says. With s(p) what a prompt p (the BOS token's text and
/// the prompt's, no other special token) gives layer i:
///
///   hidden, hidden_last  the residual stream that enters block i at the last token of p
///   hidden_avg           its mean over the tokens of p (mergekit divides by the longest prompt's length)
///   cheap_embed          the sum of the embeddings of p, the same for every layer
///
/// a source's row is P - N, divided by its length; P is the mean of s over its positive prompts and N over its negative
/// ones, 0 without (cheap_embed: the sum instead of the mean, divided by its length). random draws from normal(0, 1),
/// uniform_random from U(-1/sqrt(d), 1/sqrt(d)); `use` seeds them. Warns of layers whose rows hardly differ.
at::Tensor prompt_gates(const formats::Checkpoint& base, const std::vector<SourceExpert>& sources,
                        const std::string& mode, uint64_t seed, const char* use);

}  // namespace moesaic::exporting
