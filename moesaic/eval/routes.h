// What routers and connections do: which experts every task and token uses, how alike tasks are by it, how much every
// connection of a composition adds and what it reads; as JSON, as tables and as one HTML page.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/moe/routing_stats.h"

namespace moesaic::eval {

/// Sums over the positions for one connection.
struct ConnectionUse {
  int64_t rows = 0;      // all positions
  int64_t readers = 0;   // those that see a token
  int64_t choosers = 0;  // those that see at least two
  double added = 0;      // sum of |Y| / |H_B|
  double entropy = 0;    // sum over readers of -sum_s w_s ln w_s, nats, mean over heads
  double spread = 0;     // sum over choosers of the entropy as a share of its largest value, ln c(t)
  double first = 0;      // sum over readers of the weight on the first position, mean over heads
};

/// One task's questions together with their first accepted answers, as one would train on them.
struct TaskRoutes {
  std::string name;
  int64_t questions = 0, tokens = 0;
  moe::RoutingStats routers;
  std::vector<ConnectionUse> connections;  // in the order of LanguageModel::structure's
};
TaskRoutes route_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                      const ProgressCallback& progress = nullptr);

/// One text, token by token. Texts of tokens: what each adds to the text, "" for a part of a character.
struct TextRoutes {
  struct Stream {
    std::vector<std::string> tokens;
    std::vector<int64_t> visible;  // tokens that each token of the text sees
  };
  struct Connection {
    std::vector<float> added;                              // |Y| / |H_B| per token
    std::vector<std::vector<std::vector<float>>> weights;  // [H][T][visible]
  };
  struct Router {
    int64_t layer;
    std::vector<std::vector<float>> probs;  // [T][E], of per-head routers the mean over heads; [] of a token not read
  };
  std::vector<std::string> tokens;  // T
  /// owner -> site -> router. That of an augmenting model ("augmenting.0") has a row per token of its stream.
  std::map<std::string, std::map<std::string, Router>> routers;
  std::vector<Stream> streams;          // per augmenting model
  std::vector<Connection> connections;  // in the order of LanguageModel::structure's
};
/// Throws UsageError for a text with more attention weights than a browser can show, and when a router reads sentence
/// vectors of a data column.
TextRoutes route_text(const EvalModel& model, const std::vector<int64_t>& ids);

/// {model, adapters, routers: {owner: {site: {layer, experts}}}, structure: LanguageModel::structure() or null,
///  tasks: {name: {questions, tokens, routers: RoutingStats::json(),
///                 connections: [{added, entropy, entropy_share, first_share}]}},
///  similarity: {tasks, cosine} or null without tasks or routers,
///  text: {tokens, routers: {owner: {site: [T][E]}}, streams: [{tokens, visible}], connections: [{added, weights}]}
///        or null}
/// cosine: of two tasks' mean probabilities, all sites that both have end to end. `name` is the model's.
OrderedJson routes_json(const std::string& name, const models::LanguageModel& model,
                        const std::vector<TaskRoutes>& tasks, const TextRoutes* text = nullptr);

/// The tasks of routes_json() for a terminal: means over sites, and what each connection does.
std::string routes_table(const OrderedJson& routes);

/// What tasks use of experts as CSV: a row per task, adapter, site and expert.
std::string routes_csv(const OrderedJson& routes);

/// A page that shows routes_json(). Needs nothing from outside.
std::string routes_html(const OrderedJson& routes);
/// Whether `text` is what a file of routes_json(), routes_html() or routes_csv() holds.
bool is_routes_report(std::string_view text);

}  // namespace moesaic::eval
