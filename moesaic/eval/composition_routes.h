// What the connections of a composition do: how much each adds, and which of the augmenting model's tokens every token
// of the anchor reads; as JSON and as one HTML page.
#pragma once
#include "moesaic/eval/evaluate.h"

namespace moesaic::eval {

/// Sums over the anchor's positions for one connection.
struct ConnectionUse {
  int64_t rows = 0;      // all positions
  int64_t readers = 0;   // those that see a token
  int64_t choosers = 0;  // those that see at least two
  double added = 0;      // sum of |Y| / |H_B|
  double entropy = 0;    // sum over readers of -sum_s w_s ln w_s, nats, mean over heads
  double spread = 0;     // sum over choosers of the entropy as a share of its largest value, ln c(t)
  double first = 0;      // sum over readers of the weight on the first position, mean over heads
};

/// Reading of one task's questions together with their first accepted answers, as one would train on them.
struct TaskReading {
  std::string name;
  int64_t questions = 0, tokens = 0;
  std::vector<ConnectionUse> connections;  // of all augmenting models, in their order
};
TaskReading read_task(const EvalModel& model, const Task& task, const EvalOptions& options,
                      const ProgressCallback& progress = nullptr);

/// Reading of one text. Texts of tokens: what each adds to the text, "" for a part of a character.
struct TextReading {
  struct Stream {
    std::vector<std::string> tokens;
    std::vector<int64_t> visible;  // tokens that each anchor token sees
  };
  struct Connection {
    std::vector<float> added;                              // |Y| / |H_B| per anchor token
    std::vector<std::vector<std::vector<float>>> weights;  // [H][T][visible]
  };
  std::vector<std::string> tokens;  // the anchor's, T
  std::vector<Stream> streams;      // per augmenting model
  std::vector<Connection> connections;
};
/// Throws UsageError for a text with more weights than a browser can show.
TextReading read_text(const EvalModel& model, const std::vector<int64_t>& ids);

/// {model, adapters, num_heads, anchor: {model, blocks}, augmenting: [{model, blocks, align, mask}],
///  connections: [{model, aug, anchor}], tasks: {name: {questions, tokens, connections: [...]}},
///  text: {tokens, streams, connections} or null}
OrderedJson composition_routes_json(const std::string& model, const compose::Composition& composition,
                                    const std::vector<std::string>& adapters, const std::vector<TaskReading>& tasks,
                                    const TextReading* text = nullptr);

/// A page that shows composition_routes_json(). Needs nothing from outside.
std::string composition_routes_html(const OrderedJson& routes);

}  // namespace moesaic::eval
