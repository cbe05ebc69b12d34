#include "moesaic/eval/routes.h"

#include <cmath>

namespace moesaic::eval {
namespace {

constexpr int64_t kBatchTokens = 4096;

double rounded(double value) { return std::round(value * 1e4) / 1e4; }

}  // namespace

TaskRouting route_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                       const ProgressCallback& progress) {
  torch::NoGradGuard no_grad;
  TaskRouting result{task.name, static_cast<int64_t>(task.items.size()), 0, {}};
  const std::string delimiter = options.apply_chat_template ? "" : options.target_delimiter;
  std::vector<std::vector<int64_t>> prompts, sequences;
  std::vector<const Item*> items;
  int64_t tokens = 0;
  auto run = [&] {
    std::vector<nn::RoutingRecord> records;
    nn::ForwardContext context;
    context.routing = &records;
    context.sentence = sentence_vectors(model, items, prompts);
    model.model.hidden_states(nn::RaggedBatch::from_sequences(sequences, model.model.device()), context);
    result.stats.add(records);
    result.tokens += tokens;
    prompts.clear();
    sequences.clear();
    items.clear();
    tokens = 0;
  };
  for (size_t i = 0; i < task.items.size(); ++i) {
    const Item& item = task.items[i];
    const auto [prompt, special] = prompt_text(model, item, options.apply_chat_template);
    prompts.push_back(model.tokenizer.encode(prompt, special));
    sequences.push_back(model.tokenizer.encode(prompt + delimiter + item.targets[0], special));
    items.push_back(&item);
    tokens += static_cast<int64_t>(sequences.back().size());
    if (tokens >= kBatchTokens || i + 1 == task.items.size()) {
      run();
      if (progress) progress(static_cast<int64_t>(i) + 1);
    }
  }
  return result;
}

TextRouting route_text(const EvalModel& model, const std::vector<int64_t>& ids) {
  torch::NoGradGuard no_grad;
  TextRouting result;
  for (int64_t id : ids) result.tokens.push_back(model.tokenizer.decode({id}, false));
  const int64_t count = static_cast<int64_t>(ids.size());
  std::vector<nn::RoutingRecord> records;
  nn::ForwardContext context;
  context.routing = &records;
  MOESAIC_CHECK(!model.sentence_from_column, UsageError,
                "--text: the router reads sentence vectors from a data column, and a text has none");
  if (model.sentence_from_hidden) context.sentence = sentence_vectors(model, {}, {ids});
  model.model.hidden_states(nn::RaggedBatch::from_sequences({ids}, model.model.device()), context);
  for (const nn::RoutingRecord& record : records) {
    torch::Tensor probs = record.probs.detach().to(torch::kCPU, torch::kFloat32);
    const int64_t experts = probs.size(1);
    // [1, E] of a sentence router, [N, E], or [N*H, E] with heads innermost
    probs = probs.size(0) == 1 ? probs.expand({count, experts}) : probs.reshape({count, -1, experts}).mean(1);
    probs = probs.contiguous();
    std::vector<std::vector<float>>& rows = result.probs[record.site];
    for (int64_t t = 0; t < count; ++t) {
      const float* row = probs.data_ptr<float>() + t * experts;
      rows.emplace_back(row, row + experts);
    }
  }
  return result;
}

OrderedJson routes_json(const std::string& model, const std::vector<std::string>& adapters,
                        const std::vector<TaskRouting>& tasks, const TextRouting* text) {
  OrderedJson sites = OrderedJson::object(), by_task = OrderedJson::object(), cosine = OrderedJson::array();
  std::vector<std::string> names;
  for (const TaskRouting& task : tasks) {
    names.push_back(task.name);
    by_task[task.name] = {{"questions", task.questions}, {"tokens", task.tokens}, {"sites", task.stats.json()}};
    for (const auto& [name, site] : task.stats.sites())
      sites[name] = {{"layer", site.layer}, {"experts", site.experts()}};
    std::vector<double> row;
    for (const TaskRouting& other : tasks) row.push_back(rounded(routing_similarity(task.stats, other.stats)));
    cosine.push_back(row);
  }
  OrderedJson json = {{"model", model},
                      {"adapters", adapters},
                      {"sites", sites},
                      {"tasks", by_task},
                      {"similarity", {{"tasks", names}, {"cosine", cosine}}},
                      {"text", nullptr}};
  if (text) {
    OrderedJson probs = OrderedJson::object();
    for (const auto& [name, rows] : text->probs) {
      for (const std::vector<float>& row : rows) {
        std::vector<double> values;
        for (float value : row) values.push_back(rounded(value));
        probs[name].push_back(values);
      }
    }
    json["text"] = {{"tokens", text->tokens}, {"sites", probs}};
  }
  return json;
}

}  // namespace moesaic::eval
