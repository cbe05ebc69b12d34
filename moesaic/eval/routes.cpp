#include "moesaic/eval/routes.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "moesaic/base/check.h"
#include "moesaic/base/csv.h"
#include "moesaic/eval/page.h"
#include "moesaic/eval/pages.h"
#include "moesaic/models/finite.h"

namespace moesaic::eval {
namespace {

constexpr int64_t kBatchTokens = 4096;
constexpr int64_t kMaxWeights = 4'000'000;
constexpr size_t kMaxColumns = 16;  // experts in a line of the table
constexpr const char* kCsvHead = "task,adapter,site,layer,expert,mean_prob,prob_std,top1_share,rows\n";

double rounded(double value) { return std::round(value * 1e4) / 1e4; }

OrderedJson rounded_list(const std::vector<float>& values) {
  std::vector<double> list;
  for (const float value : values) list.push_back(rounded(value));
  return list;
}

OrderedJson rounded_rows(const std::vector<std::vector<float>>& rows) {
  OrderedJson list = OrderedJson::array();
  for (const std::vector<float>& row : rows) list.push_back(rounded_list(row));
  return list;
}

std::vector<float> floats(const torch::Tensor& tensor) {
  const torch::Tensor flat = tensor.to(torch::kCPU, torch::kFloat32).contiguous();
  return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
}

/// The place of every record's connection among all of the structure's.
std::vector<size_t> places(const OrderedJson& structure, const std::vector<nn::ReadingRecord>& readings) {
  std::vector<size_t> result;
  for (const nn::ReadingRecord& record : readings) {
    const OrderedJson& all = structure["connections"];
    size_t k = 0;
    for (int64_t left = record.connection;; ++k) {
      if (all.at(k)["augmenting"] == record.source && left-- == 0) break;
    }
    result.push_back(k);
  }
  return result;
}

void add(const nn::ReadingRecord& record, ConnectionUse& use) {
  use.rows += record.added.size(0);
  use.added += record.added.sum(torch::kFloat64).item<double>();
  for (size_t b = 0; b < record.weights.size(); ++b) {
    if (record.weights[b].size(2) == 0) continue;
    const torch::Tensor weights = record.weights[b].to(torch::kFloat64);  // [H, T, S]
    const auto counts = torch::tensor(std::vector(record.visible.begin() + record.query_offsets[b],
                                                  record.visible.begin() + record.query_offsets[b + 1]),
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

OrderedJson use_json(const ConnectionUse& use) {
  auto mean = [](double sum, int64_t count) { return count > 0 ? rounded(sum / static_cast<double>(count)) : 0.0; };
  return {{"added", mean(use.added, use.rows)},
          {"entropy", mean(use.entropy, use.readers)},
          {"entropy_share", mean(use.spread, use.choosers)},
          {"first_share", mean(use.first, use.readers)}};
}

/// What each id adds to the text.
std::vector<std::string> token_texts(const tokenizer::Tokenizer& tokenizer, const std::vector<int64_t>& ids) {
  const std::shared_ptr<const tokenizer::Tokenizer> borrowed(std::shared_ptr<const void>(), &tokenizer);
  tokenizer::StreamDecoder decoder(borrowed, /*skip_special_tokens=*/false);
  std::vector<std::string> texts;
  for (const int64_t id : ids) texts.push_back(decoder.push(id));
  if (!texts.empty()) texts.back() += decoder.finish();
  return texts;
}

OrderedJson text_json(const TextRoutes& text) {
  OrderedJson routers = OrderedJson::object(), streams = OrderedJson::array(), connections = OrderedJson::array();
  for (const auto& [owner, sites] : text.routers) {
    for (const auto& [site, router] : sites) routers[owner][site] = rounded_rows(router.probs);
  }
  for (const TextRoutes::Stream& stream : text.streams) {
    streams.push_back({{"tokens", stream.tokens}, {"visible", stream.visible}});
  }
  for (const TextRoutes::Connection& connection : text.connections) {
    OrderedJson heads = OrderedJson::array();
    for (const auto& head : connection.weights) heads.push_back(rounded_rows(head));
    connections.push_back({{"added", rounded_list(connection.added)}, {"weights", std::move(heads)}});
  }
  return {{"tokens", text.tokens},
          {"routers", std::move(routers)},
          {"streams", std::move(streams)},
          {"connections", std::move(connections)}};
}

}  // namespace

TaskRoutes route_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                      const ProgressCallback& progress) {
  torch::NoGradGuard no_grad;
  const OrderedJson structure = model.model.structure();
  TaskRoutes result{task.name, std::ssize(task.items), 0, {}, {}};
  if (!structure.is_null()) result.connections.resize(structure["connections"].size());
  const std::string delimiter = options.apply_chat_template ? "" : options.target_delimiter;
  std::vector<generate::Prompt> sequences;
  std::vector<std::vector<int64_t>> prompts;
  nn::Borders borders;
  int64_t tokens = 0;
  auto run = [&] {
    models::Text text = generate::text_of(model.model, sequences);
    text.borders = borders;
    text.prompts = prompts;
    std::vector<nn::RoutingRecord> records;
    std::vector<nn::ReadingRecord> readings;
    nn::Pass pass;
    pass.routing = &records;
    pass.readings = &readings;
    models::check_figures(model.model.hidden(text, pass), model.model, text);
    result.routers.add(records);
    const std::vector<size_t> of = places(structure, readings);
    for (size_t i = 0; i < readings.size(); ++i) add(readings[i], result.connections[of[i]]);
    result.tokens += tokens;
    sequences.clear();
    prompts.clear();
    borders.clear();
    tokens = 0;
  };
  for (size_t i = 0; i < task.items.size(); ++i) {
    const Item& item = task.items[i];
    const auto [prompt, special] = prompt_text(model, item, options.apply_chat_template);
    const RankQuestion question = make_rank_question(model.tokenizer, prompt, {delimiter + item.targets[0]}, special);
    prompts.push_back(question.prompt.ids);
    borders.push_back({std::ssize(question.prompt.ids) + question.first_of_choice[0]});
    std::vector<int64_t> ids = question.prompt.ids;
    ids.insert(ids.end(), question.choices[0].begin(), question.choices[0].end());
    tokens += std::ssize(ids);
    sequences.push_back({std::move(ids), sentence_of(model, item)});
    if (tokens >= kBatchTokens || i + 1 == task.items.size()) {
      run();
      if (progress) progress(static_cast<int64_t>(i) + 1);
    }
  }
  return result;
}

TextRoutes route_text(const EvalModel& model, const std::vector<int64_t>& ids) {
  torch::NoGradGuard no_grad;
  const int64_t count = std::ssize(ids);
  const OrderedJson structure = model.model.structure();
  MOESAIC_CHECK(model.model.needs().sentence != nn::Needs::Sentence::kColumn, UsageError,
                "--text: a router reads sentence vectors from a data column, and a text has none");
  TextRoutes result;
  if (!structure.is_null()) {
    // Every token sees those before it; two tokenizers cut a text into about as many.
    const int64_t weights =
        structure["num_heads"].get<int64_t>() * std::ssize(structure["connections"]) * count * (count + 1) / 2;
    MOESAIC_CHECK(weights <= kMaxWeights, UsageError,
                  "--text: has about {} attention weights, expected at most {}: shorten it", weights, kMaxWeights);
    result.streams.resize(structure["augmenting"].size());
    result.connections.resize(structure["connections"].size());
  }
  result.tokens = token_texts(model.tokenizer, ids);
  std::vector<nn::RoutingRecord> records;
  std::vector<nn::ReadingRecord> readings;
  nn::Pass pass;
  pass.routing = &records;
  pass.readings = &readings;
  const models::Text read = generate::text_of(model.model, {{ids}});
  models::check_figures(model.model.hidden(read, pass), model.model, read);
  for (const nn::RoutingRecord& record : records) {
    torch::Tensor probs = record.probs.to(torch::kCPU, torch::kFloat32);
    const int64_t experts = probs.size(1), heads = record.rows_per_token;
    // [1, E] of a sentence router, [N, E], or [N*H, E] with heads innermost
    probs = heads == 0 ? probs.expand({count, experts}) : probs.reshape({-1, heads, experts}).mean(1);
    TextRoutes::Router& router = result.routers[record.owner][record.site];
    router.layer = record.layer;
    // The decoder behind an encoder begins where the prompt ends.
    const int64_t unread = structure.is_null() ? count - probs.size(0) : 0;
    router.probs.resize(std::max<int64_t>(unread, 0));
    for (const torch::Tensor& row : probs.unbind(0)) router.probs.push_back(floats(row));
  }
  const std::vector<size_t> of = places(structure, readings);
  for (size_t i = 0; i < readings.size(); ++i) {
    const nn::ReadingRecord& record = readings[i];
    TextRoutes::Stream& stream = result.streams.at(record.source);
    if (stream.visible.empty()) {
      stream = {model.model.source_texts(record.source, record.sources[0]), record.visible};
    }
    TextRoutes::Connection& connection = result.connections[of[i]];
    connection.added = floats(record.added);
    for (const torch::Tensor& head : record.weights[0].unbind(0)) {
      auto& rows = connection.weights.emplace_back();
      for (int64_t t = 0; t < count; ++t) rows.push_back(floats(head[t].slice(0, 0, record.visible[t])));
    }
  }
  return result;
}

OrderedJson routes_json(const std::string& name, const models::LanguageModel& model,
                        const std::vector<TaskRoutes>& tasks, const TextRoutes* text) {
  std::vector<std::string> adapters, names;
  for (const auto& attachment : model.attachments()) adapters.push_back(attachment->owner());
  OrderedJson routers = OrderedJson::object(), by_task = OrderedJson::object(), cosine = OrderedJson::array();
  for (const TaskRoutes& task : tasks) {
    OrderedJson uses = OrderedJson::array();
    for (const ConnectionUse& use : task.connections) uses.push_back(use_json(use));
    names.push_back(task.name);
    by_task[task.name] = {{"questions", task.questions},
                          {"tokens", task.tokens},
                          {"routers", task.routers.json()},
                          {"connections", std::move(uses)}};
    for (const auto& [owner, sites] : by_task[task.name]["routers"].items()) {
      for (const auto& [site, figures] : sites.items()) {
        routers[owner][site] = {{"layer", figures["layer"]}, {"experts", figures["mean_prob"].size()}};
      }
    }
  }
  if (text != nullptr) {
    for (const auto& [owner, sites] : text->routers) {
      for (const auto& [site, router] : sites) {
        routers[owner][site] = {{"layer", router.layer}, {"experts", router.probs.back().size()}};
      }
    }
  }
  for (const TaskRoutes& a : tasks) {
    OrderedJson row = OrderedJson::array();
    for (const TaskRoutes& b : tasks) row.push_back(rounded(moe::routing_similarity(a.routers, b.routers)));
    cosine.push_back(std::move(row));
  }
  const bool compared = !tasks.empty() && !routers.empty();
  return {
      {"model", name},
      {"adapters", adapters},
      {"routers", std::move(routers)},
      {"structure", model.structure()},
      {"tasks", std::move(by_task)},
      {"similarity", compared ? OrderedJson{{"tasks", names}, {"cosine", std::move(cosine)}} : OrderedJson(nullptr)},
      {"text", text != nullptr ? text_json(*text) : OrderedJson(nullptr)}};
}

std::string routes_table(const OrderedJson& routes) {
  size_t width = 4, owner_width = 7;
  for (const auto& [name, task] : routes["tasks"].items()) width = std::max(width, name.size());
  for (const auto& [owner, sites] : routes["routers"].items()) owner_width = std::max(owner_width, owner.size());
  std::string text;
  if (!routes["similarity"].is_null()) {
    text += fmt::format("{:<{}}  {:<{}}  {:>8}  {:>8}  {:>8}  mean probability of each expert\n", "task", width,
                        "routers", owner_width, "tokens", "entropy", "max load");
  }
  for (const auto& [name, task] : routes["tasks"].items()) {
    for (const auto& [owner, sites] : task["routers"].items()) {
      std::vector<double> sums, counts;  // by expert: layers may have different numbers of them
      double entropy = 0, load = 0;
      size_t experts = 0, dead = 0;
      for (const auto& site : sites) {
        experts += site["mean_prob"].size();
        if (site.contains("dead")) dead += site["dead"].size();
        const auto mean = site["mean_prob"].get<std::vector<double>>();
        sums.resize(std::max(sums.size(), mean.size()));
        counts.resize(sums.size());
        for (size_t e = 0; e < mean.size(); ++e) {
          sums[e] += mean[e];
          counts[e] += 1;
        }
        entropy += site["entropy_share"].get<double>();
        load = std::max(load, site["max_load"].get<double>());
      }
      for (size_t e = 0; e < sums.size(); ++e) sums[e] /= counts[e];
      const size_t shown = std::min(sums.size(), kMaxColumns);
      text += fmt::format("{:<{}}  {:<{}}  {:>8}  {:>8.3f}  {:>8.3f}  {:.3f}", name, width, owner, owner_width,
                          task["tokens"].get<int64_t>(), entropy / static_cast<double>(sites.size()), load,
                          fmt::join(sums.begin(), sums.begin() + static_cast<int64_t>(shown), " "));
      if (shown < sums.size()) text += fmt::format(" ... ({} experts)", sums.size());
      if (dead > 0) text += fmt::format("  dead: {} of {}", dead, experts);
      text += "\n";
    }
  }
  if (routes["structure"].is_null()) return text;
  if (!routes["tasks"].empty()) {
    text += fmt::format("{}{:<{}}  {:<20}  {:>9}  {:>8}  {:>11}\n", text.empty() ? "" : "\n", "task", width,
                        "connection", "|Y| / |H|", "entropy", "first share");
  }
  auto place = [](const OrderedJson& json) { return json.is_string() ? json.get<std::string>() : json.dump(); };
  for (const auto& [name, task] : routes["tasks"].items()) {
    for (size_t k = 0; k < task["connections"].size(); ++k) {
      const OrderedJson& use = task["connections"][k];
      const OrderedJson& joined = routes["structure"]["connections"][k];
      text +=
          fmt::format("{:<{}}  {:<20}  {:>9.3f}  {:>8.3f}  {:>11.3f}\n", name, width,
                      fmt::format("{}: {} -> {}", joined["augmenting"].get<int64_t>(), place(joined["aug"]),
                                  place(joined["anchor"])),
                      use["added"].get<double>(), use["entropy_share"].get<double>(), use["first_share"].get<double>());
    }
  }
  return text;
}

std::string routes_csv(const OrderedJson& routes) {
  std::string csv = kCsvHead;
  for (const auto& [name, task] : routes["tasks"].items()) {
    for (const auto& [owner, sites] : task["routers"].items()) {
      for (const auto& [site, figures] : sites.items()) {
        for (size_t e = 0; e < figures["mean_prob"].size(); ++e) {
          csv += fmt::format("{},{},{},{},{},{},{},{},{}\n", csv_cell(name), csv_cell(owner), csv_cell(site),
                             figures["layer"].get<int64_t>(), e, figures["mean_prob"][e].get<double>(),
                             figures["prob_std"][e].get<double>(), figures["top1_share"][e].get<double>(),
                             figures["rows"].get<int64_t>());
        }
      }
    }
  }
  return csv;
}

bool is_routes_report(std::string_view text) {
  const auto has = [&](std::string_view part) { return text.find(part) != std::string_view::npos; };
  return text.starts_with(kCsvHead) || has("<title>Moesaic: routers and connections</title>") ||
         (has("\"routers\":") && has("\"similarity\":"));
}

std::string routes_html(const OrderedJson& routes) { return page_of(kRoutesHtml, {kRoutesCss}, {kRoutesJs}, routes); }

}  // namespace moesaic::eval
