// Beam search for one prompt: which beginnings of an answer go on, and which answers ended. It sees log-probabilities,
// not the model.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <vector>

#include "moesaic/generate/generate.h"

namespace moesaic::generate {

/// An answer, or the beginning of one.
struct Hypothesis {
  std::vector<int64_t> ids;  // without the prompt
  float log_prob = 0;        // the sum over its tokens
  float score = 0;           // of one that ended: log_prob / tokens^length_penalty
  bool stopped = false;      // of one that ended: by an EOS or a stop string, not by its length
  int64_t parent = 0;        // of one that goes on: the row of the last step that it continues
};

/// In every step, of all continuations of the running hypotheses by one token, taken from the likeliest on: those that
/// end are answers if they are among the first num_beams, and the first num_beams that do not end run on. The num_beams
/// best answers are kept. Of continuations as likely as each other the better hypothesis's comes first, then the
/// smaller token; of answers the earlier one.
///
/// It is done at max_new_tokens, or with num_beams answers and early_stopping
///   true   at once;
///   false  when log_prob / tokens^length_penalty of the best that runs does not exceed the worst answer's score;
///   never  when that does not with max_new_tokens in the place of tokens, where length_penalty > 0.
///
/// Everything is float32, in the order of transformers' GenerationMixin, so that scores are the same.
class BeamSearch {
 public:
  /// Whether the text of `ids` holds a stop string.
  using Stops = std::function<bool(const std::vector<int64_t>& ids)>;

  /// continued: what the answers go on, as a penalty on repetitions sees it. stops: null = no answer ends by its text.
  BeamSearch(const SamplingOptions& options, std::vector<int64_t> continued, Stops stops);

  /// log_probs: [R, V] float32 on the CPU, the next tokens of the R running hypotheses; at first of one, which is
  /// empty. Changed by a repetition penalty. Throws DataError when they are not numbers.
  void step(const torch::Tensor& log_probs);
  bool done() const { return done_; }
  /// What goes on, the likeliest first; num_beams at most.
  const std::vector<Hypothesis>& running() const { return running_; }
  /// What ended, the best first; num_beams when the search is done.
  const std::vector<Hypothesis>& answers() const { return answers_; }

 private:
  struct Candidate {
    float log_prob;
    int64_t row, token;
  };
  std::vector<Candidate> likeliest(const torch::Tensor& log_probs) const;
  bool ends(const std::vector<int64_t>& ids) const;
  float score(float log_prob, int64_t tokens) const;

  SamplingOptions options_;
  std::vector<int64_t> continued_;
  Stops stops_;
  std::vector<Hypothesis> running_{Hypothesis{}}, answers_;
  int64_t tokens_ = 0;  // of each running hypothesis
  bool done_ = false;
};

}  // namespace moesaic::generate
