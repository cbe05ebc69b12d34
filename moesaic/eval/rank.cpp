#include "moesaic/eval/rank.h"

#include <algorithm>
#include <numeric>

#include "moesaic/base/check.h"
#include "moesaic/models/finite.h"

namespace moesaic::eval {

namespace {

/// A prompt that an encoder reads, and choices that are texts of their own: all of them is scored.
RankQuestion apart_question(const tokenizer::Tokenizer& tokenizer, const std::string& prompt,
                            const std::vector<std::string>& choices, bool add_special_tokens, int64_t eos) {
  RankQuestion question;
  question.prompt.ids = add_special_tokens ? tokenizer.encode_start(prompt).ids : tokenizer.encode(prompt, false);
  MOESAIC_CHECK(!question.prompt.ids.empty(), DataError, "rank classification: the prompt has no tokens");
  for (const std::string& choice : choices) {
    std::vector<int64_t>& ids = question.choices.emplace_back(tokenizer.encode_behind(choice));
    if (eos >= 0) ids.push_back(eos);
    MOESAIC_CHECK(!ids.empty(), DataError, "rank classification: the choice '{}' has no tokens", choice);
  }
  question.first_scored.assign(choices.size(), 0);
  question.first_of_choice.assign(choices.size(), 0);
  return question;
}

}  // namespace

RankQuestion make_rank_question(const tokenizer::Tokenizer& tokenizer, const std::string& prompt,
                                const std::vector<std::string>& choices, bool add_special_tokens, int64_t eos) {
  if (tokenizer.prompts_apart()) return apart_question(tokenizer, prompt, choices, add_special_tokens, eos);
  RankQuestion question;
  std::vector<std::vector<int64_t>> whole;
  const size_t words = prompt.find_last_not_of(" \t\n\v\f\r");
  const size_t scored_from = words == std::string::npos ? prompt.size() : words + 1;
  for (const std::string& choice : choices) {
    const std::string text = prompt + choice;
    const tokenizer::Encoding encoding =
        add_special_tokens ? tokenizer.encode_start(text) : tokenizer.encode_with_offsets(text, false);
    std::vector<int64_t> ids = encoding.ids;
    auto first_behind = [&](size_t byte) {
      size_t first = 0;
      while (first < ids.size() && encoding.offsets[first].second <= byte) ++first;
      return first;
    };
    size_t first = first_behind(scored_from), of_choice = first_behind(prompt.size());
    if (eos >= 0) ids.push_back(eos);
    if (first == 0) {
      const std::optional<int64_t> start = tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id();
      MOESAIC_CHECK(
          start.has_value(), DataError,
          "rank classification: an empty prompt needs a first token, and the tokenizer names neither BOS nor EOS");
      ids.insert(ids.begin(), *start);
      first = 1;
      ++of_choice;
    }
    MOESAIC_CHECK(of_choice < ids.size(), DataError, "rank classification: the choice '{}' has no tokens", choice);
    question.first_scored.push_back(static_cast<int64_t>(first));
    question.first_of_choice.push_back(static_cast<int64_t>(of_choice));
    whole.push_back(std::move(ids));
  }
  int64_t shared = *std::min_element(question.first_scored.begin(), question.first_scored.end());
  for (const std::vector<int64_t>& ids : whole) {
    const auto differ = std::mismatch(ids.begin(), ids.end(), whole[0].begin(), whole[0].end()).first;
    if (&ids != &whole[0]) shared = std::min<int64_t>(shared, differ - ids.begin());
  }
  shared = std::max<int64_t>(shared, 1);
  question.prompt.ids.assign(whole[0].begin(), whole[0].begin() + shared);
  for (size_t c = 0; c < whole.size(); ++c) {
    question.choices.emplace_back(whole[c].begin() + shared, whole[c].end());
    question.first_scored[c] -= shared;
    question.first_of_choice[c] -= shared;
  }
  return question;
}

namespace {

/// The rest of all choices behind their prompts, and what predicts each of their tokens.
struct Rest {
  std::vector<std::vector<int64_t>> sequences;  // each choice of at least two tokens but its last one
  std::vector<int64_t> of;                      // the question of each
  nn::Borders borders;
  std::vector<int64_t> source;   // per token of all choices: the row of [prompts; sequences] that predicts it
  std::vector<int64_t> targets;  // these tokens
};

/// A choice's first token is predicted by its prompt; each of its tokens but the last predicts the next.
Rest rest_of(const std::vector<RankQuestion>& questions) {
  Rest rest;
  int64_t next_row = std::ssize(questions);
  for (size_t q = 0; q < questions.size(); ++q) {
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      const std::vector<int64_t>& choice = questions[q].choices[c];
      rest.source.push_back(static_cast<int64_t>(q));
      for (size_t t = 1; t < choice.size(); ++t) rest.source.push_back(next_row++);
      rest.targets.insert(rest.targets.end(), choice.begin(), choice.end());
      if (choice.size() == 1) continue;
      rest.sequences.emplace_back(choice.begin(), choice.end() - 1);
      rest.of.push_back(static_cast<int64_t>(q));
      rest.borders.push_back({std::ssize(questions[q].prompt.ids) + questions[q].first_of_choice[c]});
    }
  }
  return rest;
}

/// The tokens of the longest text that a model reads of `question`.
int64_t longest_text(const RankQuestion& question) {
  size_t longest = 0;
  for (const std::vector<int64_t>& choice : question.choices) longest = std::max(longest, choice.size());
  return std::ssize(question.prompt.ids) + static_cast<int64_t>(longest) - 1;
}

/// Every choice behind a prompt of its own, at once; `of` becomes the question of each, `source` the row that predicts
/// each token of all choices.
models::Text whole_texts(const models::LanguageModel& model, const std::vector<RankQuestion>& questions,
                         std::vector<int64_t>& of, std::vector<int64_t>& source) {
  std::vector<generate::Prompt> texts;
  std::vector<std::vector<int64_t>> prompts;
  nn::Borders borders;
  int64_t row = 0;
  for (size_t q = 0; q < questions.size(); ++q) {
    const generate::Prompt& prompt = questions[q].prompt;
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      const std::vector<int64_t>& choice = questions[q].choices[c];
      generate::Prompt& text = texts.emplace_back(prompt);
      text.ids.insert(text.ids.end(), choice.begin(), choice.end() - 1);
      prompts.push_back(prompt.ids);
      borders.push_back({std::ssize(prompt.ids) + questions[q].first_of_choice[c]});
      of.push_back(static_cast<int64_t>(q));
      row += std::ssize(prompt.ids) - 1;
      for (size_t t = 0; t < choice.size(); ++t) source.push_back(row++);
    }
  }
  models::Text text = generate::text_of(model, texts);
  text.borders = std::move(borders);
  text.prompts = std::move(prompts);
  return text;
}

/// All prompts side by side, the last row of each wanted.
models::Text prompts_of(const models::LanguageModel& model, const std::vector<RankQuestion>& questions) {
  std::vector<generate::Prompt> prompts;
  for (const RankQuestion& question : questions) prompts.push_back(question.prompt);
  models::Text text = generate::text_of(model, prompts);
  for (size_t q = 0; q < questions.size(); ++q) {
    // Where a choice's text begins in the middle of a shared token, that token belongs to all choices.
    const bool ends = std::all_of(questions[q].first_of_choice.begin(), questions[q].first_of_choice.end(),
                                  [](int64_t first) { return first == 0; });
    if (!ends) text.borders[q].clear();
  }
  const std::vector<int64_t> ends(text.tokens.offsets.begin() + 1, text.tokens.offsets.end());
  text.rows = (torch::tensor(ends, torch::kInt64) - 1).to(model.facts().device);
  return text;
}

}  // namespace

std::vector<std::vector<ChoiceScore>> rank(models::LanguageModel& model, const std::vector<RankQuestion>& questions,
                                           const generate::RoutingCallback& routing) {
  if (questions.empty()) return {};
  torch::NoGradGuard no_grad;
  const torch::Device device = model.facts().device;
  const std::unique_ptr<models::Memory> memory = model.memory(std::ssize(questions));
  auto hidden_of = [&](const models::Text& text, const std::vector<int64_t>& of) {
    std::vector<nn::RoutingRecord> records;
    nn::Pass pass;
    if (routing) pass.routing = &records;
    torch::Tensor hidden = model.hidden(text, pass, memory.get());
    if (routing) routing(records, of);
    return hidden;
  };
  Rest rest = rest_of(questions);
  torch::Tensor hidden;
  const bool in_parts = std::all_of(questions.begin(), questions.end(), [&](const RankQuestion& question) {
    return longest_text(question) <= model.exact_memory();
  });
  if (in_parts) {
    std::vector<int64_t> all(questions.size());
    std::iota(all.begin(), all.end(), 0);
    hidden = hidden_of(prompts_of(model, questions), all);
    if (!rest.sequences.empty()) {
      memory->keep(rest.of);
      const models::Text text{nn::RaggedBatch::from_sequences(rest.sequences, device), rest.borders};
      hidden = torch::cat({hidden, hidden_of(text, rest.of)});
    }
  } else {
    rest.of.clear();
    rest.source.clear();
    const models::Text text = whole_texts(model, questions, rest.of, rest.source);
    memory->keep({});
    memory->add(text.tokens.batch_size());
    hidden = hidden_of(text, rest.of);
  }
  auto to_index = [&](const std::vector<int64_t>& values) { return torch::tensor(values, torch::kInt64).to(device); };
  torch::Tensor greedy;
  const torch::Tensor log_probs =
      model.head()
          .log_probs(hidden.index_select(0, to_index(rest.source)), to_index(rest.targets), &greedy)
          .to(torch::kCPU);
  greedy = greedy.to(torch::kCPU);
  if (!log_probs.isfinite().all().item<bool>()) {
    std::vector<generate::Prompt> whole;
    for (const RankQuestion& question : questions) {
      for (const std::vector<int64_t>& choice : question.choices) {
        generate::Prompt& text = whole.emplace_back(question.prompt);
        text.ids.insert(text.ids.end(), choice.begin(), choice.end());
      }
    }
    models::check_figures(log_probs, model, generate::text_of(model, whole));
  }

  std::vector<std::vector<ChoiceScore>> scores;
  int64_t row = 0;
  for (const RankQuestion& question : questions) {
    std::vector<ChoiceScore>& of_question = scores.emplace_back();
    for (size_t c = 0; c < question.choices.size(); ++c) {
      ChoiceScore score{0, true};
      for (int64_t t = 0; t < std::ssize(question.choices[c]); ++t, ++row) {
        if (t < question.first_scored[c]) continue;
        score.logprob += log_probs.data_ptr<float>()[row];
        score.is_greedy = score.is_greedy && greedy.data_ptr<bool>()[row];
      }
      of_question.push_back(score);
    }
  }
  return scores;
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
