// What the routers of an adapter do: expert use per task, the tasks' similarity by it, and the experts of each token of
// a text; as JSON and as one HTML page.
#pragma once
#include "moesaic/eval/evaluate.h"

namespace moesaic::eval {

/// Routing of one task's questions together with their first accepted answers, as one would train on them.
struct TaskRouting {
  std::string name;
  int64_t questions = 0, tokens = 0;
  RoutingStats stats;
};
TaskRouting route_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                       const ProgressCallback& progress = nullptr);

/// Probabilities of every token of one text at every site. Per-head routers: the mean over heads.
struct TextRouting {
  std::vector<std::string> tokens;                               // their text
  std::map<std::string, std::vector<std::vector<float>>> probs;  // site -> [tokens][E]
};
TextRouting route_text(const EvalModel& model, const std::vector<int64_t>& ids);

/// {model, adapters, sites: {name: {layer, experts}}, tasks: {name: {questions, tokens, sites: RoutingStats::json}},
///  similarity: {tasks, cosine}, text: {tokens, sites} or null}
OrderedJson routes_json(const std::string& model, const std::vector<std::string>& adapters,
                        const std::vector<TaskRouting>& tasks, const TextRouting* text = nullptr);

/// A page that shows routes_json(): heat maps task x expert per layer, entropy by layer, the similarity of tasks and
/// the experts of each token. Needs nothing from outside.
std::string routes_html(const OrderedJson& routes);

}  // namespace moesaic::eval
