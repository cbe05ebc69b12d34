#include "moesaic/eval/composition_routes.h"

#include <cmath>

namespace moesaic::eval {
namespace {

constexpr int64_t kBatchTokens = 4096;
constexpr int64_t kMaxWeights = 4'000'000;

double rounded(double value) { return std::round(value * 1e4) / 1e4; }

std::vector<float> floats(const torch::Tensor& tensor) {
  const torch::Tensor flat = tensor.to(torch::kCPU, torch::kFloat32).contiguous();
  return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
}

void add(const compose::ConnectionRecord& record, const compose::Visibility& seen, ConnectionUse& use) {
  use.rows += record.added.size(0);
  use.added += record.added.sum(torch::kFloat64).item<double>();
  for (size_t b = 0; b < record.weights.size(); ++b) {
    if (record.weights[b].size(2) == 0) continue;
    const torch::Tensor weights = record.weights[b].to(torch::kFloat64);  // [H, T, S]
    const auto counts = torch::tensor(std::vector(seen.visible.begin() + seen.query_offsets[b],
                                                  seen.visible.begin() + seen.query_offsets[b + 1]),
                                      torch::kFloat64)
                            .to(weights.device());
    // 0 ln 0 = 0; rows that see nothing or one token have no entropy.
    const torch::Tensor entropy = -at::xlogy(weights, weights).sum(2).mean(0);  // [T]
    use.readers += (counts > 0).sum().item<int64_t>();
    use.choosers += (counts > 1).sum().item<int64_t>();
    use.entropy += entropy.sum().item<double>();
    use.spread += (entropy / counts.log()).masked_fill(counts < 2, 0.0).sum().item<double>();
    use.first += weights.select(2, 0).mean(0).sum().item<double>();
  }
}

/// What each id adds to the text.
std::vector<std::string> token_texts(const std::shared_ptr<const tokenizer::Tokenizer>& tokenizer,
                                     const std::vector<int64_t>& ids) {
  tokenizer::StreamDecoder decoder(tokenizer, /*skip_special_tokens=*/false);
  std::vector<std::string> texts;
  for (const int64_t id : ids) texts.push_back(decoder.push(id));
  if (!texts.empty()) texts.back() += decoder.finish();
  return texts;
}

OrderedJson use_json(const ConnectionUse& use) {
  auto mean = [](double sum, int64_t count) { return count > 0 ? rounded(sum / static_cast<double>(count)) : 0.0; };
  return {{"added", mean(use.added, use.rows)},
          {"entropy", mean(use.entropy, use.readers)},
          {"entropy_share", mean(use.spread, use.choosers)},
          {"first_share", mean(use.first, use.readers)}};
}

OrderedJson rounded_list(const std::vector<float>& values) {
  std::vector<double> list;
  for (const float value : values) list.push_back(rounded(value));
  return list;
}

}  // namespace

TaskReading read_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                      const ProgressCallback& progress) {
  torch::NoGradGuard no_grad;
  compose::Composition& composition = *model.composition;
  TaskReading result{task.name, std::ssize(task.items), 0, {}};
  const std::string delimiter = options.apply_chat_template ? "" : options.target_delimiter;
  std::vector<std::vector<int64_t>> sequences;
  compose::Borders borders;
  int64_t tokens = 0;
  auto run = [&] {
    const nn::RaggedBatch batch = nn::RaggedBatch::from_sequences(sequences, model.model.device());
    const auto aligned = composition.align(batch, borders);
    const auto records = composition.watch(batch, aligned);
    result.connections.resize(records.size());
    for (size_t k = 0; k < records.size(); ++k) {
      add(records[k], aligned[records[k].augmenting].seen, result.connections[k]);
    }
    result.tokens += tokens;
    sequences.clear();
    borders.clear();
    tokens = 0;
  };
  for (size_t i = 0; i < task.items.size(); ++i) {
    const auto [prompt, special] = prompt_text(model, task.items[i], options.apply_chat_template);
    const RankQuestion question =
        make_rank_question(model.tokenizer, prompt, {delimiter + task.items[i].targets[0]}, special);
    std::vector<int64_t>& ids = sequences.emplace_back(question.prompt);
    borders.push_back({std::ssize(ids) + question.first_scored[0]});
    ids.insert(ids.end(), question.choices[0].begin(), question.choices[0].end());
    tokens += std::ssize(ids);
    if (tokens >= kBatchTokens || i + 1 == task.items.size()) {
      run();
      if (progress) progress(static_cast<int64_t>(i) + 1);
    }
  }
  return result;
}

TextReading read_text(const EvalModel& model, const std::vector<int64_t>& ids) {
  torch::NoGradGuard no_grad;
  compose::Composition& composition = *model.composition;
  const nn::RaggedBatch batch = nn::RaggedBatch::from_sequences({ids}, model.model.device());
  const auto aligned = composition.align(batch, {{std::ssize(ids)}});
  int64_t count = 0;
  for (size_t m = 0; m < aligned.size(); ++m) {
    const auto& visible = aligned[m].seen.visible;
    count += std::accumulate(visible.begin(), visible.end(), int64_t{0}) * composition.config().connection.num_heads *
             std::ssize(composition.config().augmenting[m].connections);
  }
  MOESAIC_CHECK(count <= kMaxWeights, UsageError, "--text: has {} attention weights, expected at most {}: shorten it",
                count, kMaxWeights);
  TextReading result;
  result.tokens = token_texts(composition.anchor_member().tokenizer, ids);
  for (size_t m = 0; m < aligned.size(); ++m) {
    result.streams.push_back(
        {token_texts(composition.augmenting()[m].tokenizer, aligned[m].tokens[0]), aligned[m].seen.visible});
  }
  for (const compose::ConnectionRecord& record : composition.watch(batch, aligned)) {
    TextReading::Connection& connection = result.connections.emplace_back();
    connection.added = floats(record.added);
    const std::vector<int64_t>& visible = aligned[record.augmenting].seen.visible;
    for (const torch::Tensor& head : record.weights[0].unbind(0)) {
      auto& rows = connection.weights.emplace_back();
      for (size_t t = 0; t < visible.size(); ++t) {
        rows.push_back(floats(head[static_cast<int64_t>(t)].slice(0, 0, visible[t])));
      }
    }
  }
  return result;
}

OrderedJson composition_routes_json(const std::string& model, const compose::Composition& composition,
                                    const std::vector<std::string>& adapters, const std::vector<TaskReading>& tasks,
                                    const TextReading* text) {
  auto member_json = [](const compose::Member& member) {
    return OrderedJson{{"model", member.checkpoint ? member.checkpoint->path().string() : ""},
                       {"blocks", member.model->config().num_layers}};
  };
  OrderedJson augmenting = OrderedJson::array(), connections = OrderedJson::array(), by_task = OrderedJson::object();
  for (size_t m = 0; m < composition.augmenting().size(); ++m) {
    const compose::AugmentingConfig& how = composition.config().augmenting[m];
    OrderedJson entry = member_json(composition.augmenting()[m]);
    entry["align"] = how.align;
    entry["mask"] = how.mask;
    augmenting.push_back(std::move(entry));
    for (const compose::ConnectionPair& pair : how.connections) {
      connections.push_back({{"augmenting", m}, {"aug", pair.aug}, {"anchor", pair.anchor}});
    }
  }
  for (const TaskReading& task : tasks) {
    OrderedJson uses = OrderedJson::array();
    for (const ConnectionUse& use : task.connections) uses.push_back(use_json(use));
    by_task[task.name] = {{"questions", task.questions}, {"tokens", task.tokens}, {"connections", std::move(uses)}};
  }
  OrderedJson json{{"model", model},
                   {"adapters", adapters},
                   {"num_heads", composition.config().connection.num_heads},
                   {"anchor", member_json(composition.anchor_member())},
                   {"augmenting", std::move(augmenting)},
                   {"connections", std::move(connections)},
                   {"tasks", std::move(by_task)},
                   {"text", nullptr}};
  if (text == nullptr) return json;
  OrderedJson streams = OrderedJson::array(), read = OrderedJson::array();
  for (const TextReading::Stream& stream : text->streams) {
    streams.push_back({{"tokens", stream.tokens}, {"visible", stream.visible}});
  }
  for (const TextReading::Connection& connection : text->connections) {
    OrderedJson heads = OrderedJson::array();
    for (const auto& head : connection.weights) {
      OrderedJson rows = OrderedJson::array();
      for (const auto& row : head) rows.push_back(rounded_list(row));
      heads.push_back(std::move(rows));
    }
    read.push_back({{"added", rounded_list(connection.added)}, {"weights", std::move(heads)}});
  }
  json["text"] = {{"tokens", text->tokens}, {"streams", std::move(streams)}, {"connections", std::move(read)}};
  return json;
}

}  // namespace moesaic::eval
