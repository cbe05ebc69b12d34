// What routers decided over many rows: the numbers behind logs and expert-use pictures.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/nn/pass.h"

namespace moesaic::moe {

/// Sums over the rows that one router has routed. E experts; p: probabilities over all experts, w: the weights that mix
/// them, after top-k.
struct SiteRouting {
  int64_t layer = 0;
  int64_t rows = 0;                     // a per-head router has several per token
  std::vector<double> prob_sum;         // [E] sum of p
  std::vector<double> prob_square_sum;  // [E] sum of p^2
  std::vector<double> weight_sum;       // [E] sum of w
  std::vector<int64_t> top1;            // [E] rows where the expert was the most probable (first on ties)
  double entropy_sum = 0;               // sum of -sum_e p_e ln p_e, nats
  std::vector<double> kept;             // [E] rows that have the expert; empty where every row has all
  std::vector<double> together;         // [E, E] rows that have both

  int64_t experts() const { return static_cast<int64_t>(prob_sum.size()); }
  double mean_prob(int64_t expert) const { return prob_sum[expert] / static_cast<double>(rows); }
  /// Mean entropy in nats; ln E when every row is uniform.
  double entropy() const { return entropy_sum / static_cast<double>(rows); }
  /// The mean entropy over ln E: 1 when every row is uniform.
  double entropy_share() const;
  /// An expert's part of all the weight.
  double load(int64_t expert) const;
  double max_load() const;
  /// Coefficient of variation of the loads: 0 when they are equal.
  double load_cv() const;
  /// Of a router that keeps k experts a row: {kept_share [E] (of all kept), dead (the experts below a tenth of an equal
  /// share), partner [E] (whom an expert's rows have most often beside it, -1: nobody), partner_share [E] (how many of
  /// them)}; else {}.
  OrderedJson kept_json() const;
};

/// Routing by owner (RoutingRecord::owner) and site. Filled pass by pass from Pass::routing; no padding exists, so
/// every row counts.
class RoutingStats {
 public:
  using Sites = std::map<std::string, SiteRouting>;  // by site path

  /// Throws DataError when one owner's site comes with another number of experts than before.
  void add(const std::vector<nn::RoutingRecord>& records);
  /// Those of other rows, as sums() of them.
  void add(const Json& sums);
  /// All of it, without loss.
  Json sums() const;
  bool empty() const { return owners_.empty(); }
  const std::map<std::string, Sites>& owners() const { return owners_; }
  /// {owner: {site: {layer, rows, mean_prob [E], prob_std [E], top1_share [E], entropy (nats), entropy_share,
  /// max_load}}}
  OrderedJson json() const;
  /// {"entropy_share", "load_cv", "max_load", "layers": [{"owner", "layer", the same}]}: means over routers of the
  /// first two and the largest load. Layers of different owners are different layers.
  Json summary() const;
  /// The largest load of one expert of one router, and which router that is.
  std::pair<double, std::string> largest_load() const;

 private:
  std::map<std::string, Sites> owners_;
};

/// Cosine of the two mean-probability vectors over all routers that both have, end to end; 0 without a common one.
/// Throws DataError when a common one has different numbers of experts.
double routing_similarity(const RoutingStats& a, const RoutingStats& b);

/// How much a router's expert tells of the task, 0 to 1, the mean over the routers that all tasks have:
///
///   (1/T) sum_t KL(p_t || p) / ln min(E, T)     p_t [E]: the mean probabilities of task t; p: their mean over tasks
///
/// 0: all tasks use the experts alike; 1: every task has its own. NaN for fewer than two tasks or no common router.
/// Throws DataError when a common one has different numbers of experts.
double task_information(const std::vector<RoutingStats>& tasks);

/// `value` to 6 digits behind the point: what figures in JSON have.
double rounded(double value);

}  // namespace moesaic::moe
