// Router statistics while training: is the load spread, or do a few experts take everything?
#pragma once
#include <torch/torch.h>

#include <map>

#include "moesaic/base/json.h"
#include "moesaic/nn/context.h"

namespace moesaic::train {

/// Adds up routing records of one step. An expert's load is its share of the weights that mix the experts.
class RouterLog {
 public:
  void add(const std::vector<nn::RoutingRecord>& records);
  bool empty() const { return sites_.empty(); }
  /// The largest load of one expert at one site, and that site.
  std::pair<double, std::string> largest_share() const;
  /// {"entropy", "load_cv", "max_share", "layers": [{"layer", "entropy", "load_cv", "max_share"}]}: entropy of a row's
  /// probabilities over log E (1 = uniform) and coefficient of variation of the loads, means over sites; max_share the
  /// largest load.
  Json summary() const;

 private:
  struct Site {
    int64_t layer = 0, rows = 0;
    double entropy = 0;   // sum over rows, in units of log E
    torch::Tensor loads;  // [E] float64, sum over rows of the weights
  };
  std::map<std::string, Site> sites_;
};

}  // namespace moesaic::train
