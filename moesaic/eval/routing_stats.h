// What routers decided over many rows, per site: the numbers behind expert-use pictures.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/nn/context.h"

namespace moesaic::eval {

/// Sums over the rows one site has routed. E experts.
struct SiteRouting {
  int64_t layer = 0;
  int64_t rows = 0;                     // rows routed; a per-head router has several per token
  std::vector<double> prob_sum;         // [E] sum of p
  std::vector<double> prob_square_sum;  // [E] sum of p^2
  std::vector<int64_t> top1;            // [E] rows where the expert was the most probable (first on ties)
  double entropy_sum = 0;               // sum of -sum_e p_e ln p_e, nats

  int64_t experts() const { return static_cast<int64_t>(prob_sum.size()); }
  double mean_prob(int64_t expert) const { return prob_sum[expert] / static_cast<double>(rows); }
  /// Mean entropy in nats; ln E when every row is uniform.
  double entropy() const { return entropy_sum / static_cast<double>(rows); }
};

/// Routing of one task. Filled pass by pass from ForwardContext::routing; no padding exists, so every row counts.
class RoutingStats {
 public:
  void add(const std::vector<nn::RoutingRecord>& records);
  bool empty() const { return sites_.empty(); }
  const std::map<std::string, SiteRouting>& sites() const { return sites_; }
  /// Per site: layer, rows, mean_prob [E], prob_std [E], top1_share [E], entropy (nats), max_share.
  OrderedJson json() const;

 private:
  std::map<std::string, SiteRouting> sites_;  // by site path
};

/// Cosine of the two tasks' mean-probability vectors, all sites end to end. Throws DataError for other sites.
double routing_similarity(const RoutingStats& a, const RoutingStats& b);

}  // namespace moesaic::eval
