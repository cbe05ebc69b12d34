#include "moesaic/eval/rank.h"

#include <algorithm>

#include "moesaic/base/check.h"

namespace moesaic::eval {

RankQuestion make_rank_question(const tokenizer::Tokenizer& tokenizer, const std::string& prompt,
                                const std::vector<std::string>& choices, bool add_special_tokens, int64_t eos) {
  RankQuestion question;
  std::vector<std::vector<int64_t>> whole;
  for (const std::string& choice : choices) {
    const tokenizer::Encoding encoding = tokenizer.encode_with_offsets(prompt + choice, add_special_tokens);
    std::vector<int64_t> ids = encoding.ids;
    size_t first = 0;
    while (first < ids.size() && encoding.offsets[first].second <= prompt.size()) ++first;
    // A special token at the end (some tokenizers add EOS) holds no text; it is not the choice's.
    size_t last = ids.size();
    while (last > first && encoding.offsets[last - 1].first == encoding.offsets[last - 1].second &&
           encoding.offsets[last - 1].second <= prompt.size()) {
      --last;
    }
    ids.resize(last);
    if (eos >= 0) ids.push_back(eos);
    if (first == 0) {
      const std::optional<int64_t> start = tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id();
      MOESAIC_CHECK(
          start.has_value(), DataError,
          "rank classification: an empty prompt needs a first token, and the tokenizer names neither BOS nor EOS");
      ids.insert(ids.begin(), *start);
      first = 1;
    }
    MOESAIC_CHECK(first < ids.size(), DataError, "rank classification: the choice '{}' has no tokens", choice);
    question.first_scored.push_back(static_cast<int64_t>(first));
    whole.push_back(std::move(ids));
  }
  int64_t shared = *std::min_element(question.first_scored.begin(), question.first_scored.end());
  for (const std::vector<int64_t>& ids : whole) {
    const auto differ = std::mismatch(ids.begin(), ids.end(), whole[0].begin(), whole[0].end()).first;
    if (&ids != &whole[0]) shared = std::min<int64_t>(shared, differ - ids.begin());
  }
  shared = std::max<int64_t>(shared, 1);
  question.prompt.assign(whole[0].begin(), whole[0].begin() + shared);
  for (size_t c = 0; c < whole.size(); ++c) {
    question.choices.emplace_back(whole[c].begin() + shared, whole[c].end());
    question.first_scored[c] -= shared;
  }
  return question;
}

namespace {

/// One of the two passes: all prompts, or the rest of all choices behind them.
struct Pass {
  nn::RaggedBatch batch;
  std::vector<int64_t> of;   // the question of each sequence
  compose::Borders borders;  // where the texts of choices begin
  bool behind_prompt;        // sequence i goes on where the prompt of question of[i] ended
};

/// `forward` returns the final hidden states of a pass, [N, d].
std::vector<std::vector<ChoiceScore>> rank_in_two_passes(const models::CausalLM& model,
                                                         const std::vector<RankQuestion>& questions,
                                                         const std::function<torch::Tensor(const Pass&)>& forward) {
  if (questions.empty()) return {};
  torch::NoGradGuard no_grad;
  const torch::Device device = model.device();
  auto to_index = [&](const std::vector<int64_t>& values) { return torch::tensor(values, torch::kInt64).to(device); };
  std::vector<std::vector<int64_t>> prompts;
  std::vector<int64_t> order, last_rows;
  int64_t rows = 0;
  for (size_t q = 0; q < questions.size(); ++q) {
    prompts.push_back(questions[q].prompt);
    order.push_back(static_cast<int64_t>(q));
    last_rows.push_back((rows += static_cast<int64_t>(questions[q].prompt.size())) - 1);
  }
  Pass prompt_pass{nn::RaggedBatch::from_sequences(prompts, device), order, {}, false};
  for (const RankQuestion& question : questions) {
    // Where a choice's text begins in the middle of a shared token, that token belongs to all choices.
    const bool ends = std::all_of(question.first_scored.begin(), question.first_scored.end(),
                                  [](int64_t first) { return first == 0; });
    prompt_pass.borders.push_back(ends ? std::vector{std::ssize(question.prompt)} : std::vector<int64_t>{});
  }
  const torch::Tensor prompt_hidden = forward(prompt_pass).index_select(0, to_index(last_rows));

  // Behind a choice's first token, which the prompt predicts, each token but the last predicts the next.
  std::vector<std::vector<int64_t>> rest;
  std::vector<int64_t> rest_of;  // question of each entry of `rest`
  compose::Borders rest_borders;
  std::vector<int64_t> source;  // row of [prompt rows; rest rows] that predicts each token of all choices, in order
  std::vector<int64_t> targets;
  int64_t next_row = static_cast<int64_t>(questions.size());
  for (size_t q = 0; q < questions.size(); ++q) {
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      const std::vector<int64_t>& choice = questions[q].choices[c];
      source.push_back(static_cast<int64_t>(q));
      for (size_t t = 1; t < choice.size(); ++t) source.push_back(next_row++);
      targets.insert(targets.end(), choice.begin(), choice.end());
      if (choice.size() == 1) continue;
      rest.emplace_back(choice.begin(), choice.end() - 1);
      rest_of.push_back(static_cast<int64_t>(q));
      rest_borders.push_back({std::ssize(questions[q].prompt) + questions[q].first_scored[c]});
    }
  }
  torch::Tensor hidden = prompt_hidden;
  if (!rest.empty()) {
    const Pass pass{nn::RaggedBatch::from_sequences(rest, device), rest_of, rest_borders, true};
    hidden = torch::cat({prompt_hidden, forward(pass)});
  }
  torch::Tensor greedy;
  const torch::Tensor logprobs =
      generate::target_logprobs(model, hidden.index_select(0, to_index(source)), to_index(targets), &greedy)
          .to(torch::kCPU);
  greedy = greedy.to(torch::kCPU);

  std::vector<std::vector<ChoiceScore>> scores;
  int64_t row = 0;
  for (const RankQuestion& question : questions) {
    std::vector<ChoiceScore>& of_question = scores.emplace_back();
    for (size_t c = 0; c < question.choices.size(); ++c) {
      ChoiceScore score{0, true};
      for (int64_t t = 0; t < static_cast<int64_t>(question.choices[c].size()); ++t, ++row) {
        if (t < question.first_scored[c]) continue;
        score.logprob += logprobs.data_ptr<float>()[row];
        score.is_greedy = score.is_greedy && greedy.data_ptr<bool>()[row];
      }
      of_question.push_back(score);
    }
  }
  return scores;
}

}  // namespace

std::vector<std::vector<ChoiceScore>> rank(models::CausalLM& model, const std::vector<RankQuestion>& questions,
                                           const torch::Tensor& sentence, const generate::RoutingCallback& routing) {
  nn::KvCache cache = model.make_cache(std::ssize(questions));
  torch::Tensor vectors = sentence;
  return rank_in_two_passes(model, questions, [&](const Pass& pass) {
    if (pass.behind_prompt) {
      cache = cache.select(pass.of);
      if (vectors.defined()) {
        vectors = vectors.index_select(0, torch::tensor(pass.of, torch::kInt64).to(vectors.device()));
      }
    }
    std::vector<nn::RoutingRecord> records;
    nn::ForwardContext context;
    context.cache = &cache;
    context.sentence = vectors;
    if (routing) context.routing = &records;
    torch::Tensor hidden = model.hidden_states(pass.batch, context);
    if (routing) routing(records, pass.of);
    return hidden;
  });
}

std::vector<std::vector<ChoiceScore>> rank(compose::Composition& composition,
                                           const std::vector<RankQuestion>& questions) {
  compose::CompositionState state = composition.make_state(std::ssize(questions));
  return rank_in_two_passes(composition.anchor(), questions, [&](const Pass& pass) {
    if (pass.behind_prompt) state = state.select(pass.of);
    nn::ForwardContext context;
    return composition.hidden_states(pass.batch, pass.borders, context, &state);
  });
}

Winner first_largest(const std::vector<double>& values) {
  Winner winner;
  for (size_t i = 1; i < values.size(); ++i) {
    if (values[i] > values[winner.index]) {
      winner = {i, false};
    } else if (values[i] == values[winner.index]) {
      winner.tied = true;
    }
  }
  return winner;
}

}  // namespace moesaic::eval
