#include "moesaic/generate/beam_search.h"

#include <algorithm>
#include <cmath>

#include "moesaic/base/check.h"
#include "moesaic/generate/sampling.h"

namespace moesaic::generate {

BeamSearch::BeamSearch(const SamplingOptions& options, std::vector<int64_t> continued, Stops stops)
    : options_(options), continued_(std::move(continued)), stops_(std::move(stops)) {}

/// As many continuations as always hold num_beams that do not end with an EOS.
std::vector<BeamSearch::Candidate> BeamSearch::likeliest(const torch::Tensor& log_probs) const {
  const int64_t vocabulary = log_probs.size(1);
  const size_t count = options_.num_beams * (1 + std::max<size_t>(options_.eos_ids.size(), 1));
  // They come by row and token, so the later of equals is the worse one.
  auto better = [](const Candidate& a, const Candidate& b) {
    return a.log_prob != b.log_prob ? a.log_prob > b.log_prob : std::tie(a.row, a.token) < std::tie(b.row, b.token);
  };
  std::vector<Candidate> heap;  // the worst in front
  for (int64_t row = 0; row < std::ssize(running_); ++row) {
    const float* next = log_probs.data_ptr<float>() + row * vocabulary;
    check_logits(!std::isnan(next[0]), continued_.size() + tokens_);  // one that is not a number makes all so
    const float so_far = running_[row].log_prob;
    for (int64_t token = 0; token < vocabulary; ++token) {
      const Candidate candidate{next[token] + so_far, row, token};
      if (heap.size() == count) {
        if (candidate.log_prob <= heap.front().log_prob) continue;
        std::pop_heap(heap.begin(), heap.end(), better);
        heap.pop_back();
      }
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end(), better);
    }
  }
  std::sort_heap(heap.begin(), heap.end(), better);
  return heap;
}

bool BeamSearch::ends(const std::vector<int64_t>& ids) const {
  const std::vector<int64_t>& eos = options_.eos_ids;
  return std::find(eos.begin(), eos.end(), ids.back()) != eos.end() || (stops_ && stops_(ids));
}

float BeamSearch::score(float log_prob, int64_t tokens) const {
  return log_prob / static_cast<float>(std::pow(static_cast<double>(tokens), options_.length_penalty));
}

void BeamSearch::step(const torch::Tensor& log_probs) {
  MOESAIC_ASSERT(log_probs.size(0) == std::ssize(running_) && log_probs.is_contiguous() && !done_);
  for (size_t row = 0; options_.repetition_penalty != 1.0 && row < running_.size(); ++row) {
    std::vector<int64_t> seen = continued_;
    seen.insert(seen.end(), running_[row].ids.begin(), running_[row].ids.end());
    const torch::Tensor next = log_probs[static_cast<int64_t>(row)];
    apply_repetition_penalty({next.data_ptr<float>(), static_cast<size_t>(next.numel())}, seen,
                             options_.repetition_penalty);
  }
  const auto beams = static_cast<size_t>(options_.num_beams);
  const std::vector<Candidate> candidates = likeliest(log_probs);
  const bool last = ++tokens_ == options_.max_new_tokens;
  std::vector<Hypothesis> next;
  for (size_t rank = 0; rank < candidates.size() && (rank < beams || next.size() < beams); ++rank) {
    const auto& [log_prob, row, token] = candidates[rank];
    Hypothesis hypothesis{.ids = running_[row].ids, .log_prob = log_prob, .parent = row};
    hypothesis.ids.push_back(token);
    hypothesis.stopped = ends(hypothesis.ids);
    if (!hypothesis.stopped && !last) {
      if (next.size() < beams) next.push_back(std::move(hypothesis));
    } else if (rank < beams) {
      hypothesis.score = score(log_prob, tokens_);
      answers_.push_back(std::move(hypothesis));
    }
  }
  running_ = std::move(next);
  std::stable_sort(answers_.begin(), answers_.end(),
                   [](const Hypothesis& a, const Hypothesis& b) { return a.score > b.score; });
  if (answers_.size() > beams) answers_.resize(beams);
  done_ = running_.empty();
  if (done_ || answers_.size() < beams) return;
  const bool hopes_for_length = options_.early_stopping == "never" && options_.length_penalty > 0;
  const float best = score(running_[0].log_prob, hopes_for_length ? options_.max_new_tokens : tokens_);
  done_ = options_.early_stopping == "true" || best <= answers_.back().score;
}

}  // namespace moesaic::generate
