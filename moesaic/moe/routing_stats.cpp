#include "moesaic/moe/routing_stats.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moesaic/base/check.h"

namespace moesaic::moe {
namespace {

void add_to(std::vector<double>& sums, const torch::Tensor& values) {
  const torch::Tensor row = values.to(torch::kCPU, torch::kFloat64).contiguous();
  for (size_t e = 0; e < sums.size(); ++e) sums[e] += row.data_ptr<double>()[e];
}

void add_kept(SiteRouting& site, const torch::Tensor& weights) {
  const torch::Tensor kept = (weights > 0).to(torch::kFloat64);
  const auto experts = static_cast<size_t>(weights.size(1));
  if (kept.sum(1).max().item<double>() >= static_cast<double>(experts)) return;
  site.kept.resize(experts, 0.0);
  site.together.resize(experts * experts, 0.0);
  add_to(site.kept, kept.sum(0));
  add_to(site.together, kept.t().mm(kept).flatten());
}

/// What a summary says of one or many routers.
struct Means {
  double entropy_share = 0, load_cv = 0, max_load = 0;
  int64_t routers = 0;

  void add(const SiteRouting& site) {
    entropy_share += site.entropy_share();
    load_cv += site.load_cv();
    max_load = std::max(max_load, site.max_load());
    ++routers;
  }
  Json json() const {
    const auto n = static_cast<double>(routers);
    return {{"entropy_share", rounded(entropy_share / n)},
            {"load_cv", rounded(load_cv / n)},
            {"max_load", rounded(max_load)}};
  }
};

void add_to(std::vector<double>& sums, const std::vector<double>& values) {
  if (sums.size() < values.size()) sums.resize(values.size(), 0.0);
  for (size_t e = 0; e < values.size(); ++e) sums[e] += values[e];
}

}  // namespace

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(SiteRouting, layer, rows, prob_sum, prob_square_sum, weight_sum, top1, entropy_sum,
                                   kept, together)

double rounded(double value) { return std::round(value * 1e6) / 1e6; }

double SiteRouting::entropy_share() const { return entropy() / std::log(static_cast<double>(experts())); }

double SiteRouting::load(int64_t expert) const {
  return weight_sum[expert] / std::accumulate(weight_sum.begin(), weight_sum.end(), 0.0);
}

double SiteRouting::max_load() const {
  return load(std::max_element(weight_sum.begin(), weight_sum.end()) - weight_sum.begin());
}

double SiteRouting::load_cv() const {
  const double mean = 1.0 / static_cast<double>(experts());
  double squares = 0;
  for (int64_t e = 0; e < experts(); ++e) squares += (load(e) - mean) * (load(e) - mean);
  return std::sqrt(squares * mean) / mean;
}

OrderedJson SiteRouting::kept_json() const {
  if (kept.empty()) return OrderedJson::object();
  const double all = std::accumulate(kept.begin(), kept.end(), 0.0);
  std::vector<double> share, partner_share;
  std::vector<int64_t> dead, partner;
  for (int64_t e = 0; e < experts(); ++e) {
    share.push_back(rounded(kept[e] / all));
    if (kept[e] / all < 0.1 / static_cast<double>(experts())) dead.push_back(e);
    int64_t best = -1;
    double most = 0;
    for (int64_t other = 0; other < experts(); ++other) {
      const double both = together[e * experts() + other];
      if (other != e && both > most) std::tie(best, most) = std::pair(other, both);
    }
    partner.push_back(best);
    partner_share.push_back(best < 0 ? 0.0 : rounded(most / kept[e]));
  }
  return {{"kept_share", share}, {"dead", dead}, {"partner", partner}, {"partner_share", partner_share}};
}

void RoutingStats::add(const std::vector<nn::RoutingRecord>& records) {
  torch::NoGradGuard no_grad;
  for (const nn::RoutingRecord& record : records) {
    SiteRouting& site = owners_[record.owner][record.site];
    const torch::Tensor probs = record.probs.detach();
    const int64_t experts = probs.size(1);
    if (site.prob_sum.empty()) {
      site.layer = record.layer;
      for (auto* sums : {&site.prob_sum, &site.prob_square_sum, &site.weight_sum}) sums->assign(experts, 0.0);
      site.top1.assign(experts, 0);
    }
    MOESAIC_CHECK(site.experts() == experts, DataError,
                  "routing statistics of {} at {}: got {} experts, expected {}: another adapter of the same name?",
                  record.owner, record.site, experts, site.experts());
    add_to(site.prob_sum, probs.sum(0, false, torch::kFloat64));
    add_to(site.prob_square_sum, probs.square().sum(0, false, torch::kFloat64));
    add_to(site.weight_sum, record.weights.detach().sum(0, false, torch::kFloat64));
    // p ln p -> 0 for p -> 0
    site.entropy_sum -= torch::xlogy(probs, probs).sum(torch::kFloat64).item<double>();
    const torch::Tensor top = probs.argmax(1).bincount({}, experts).to(torch::kCPU).contiguous();
    for (int64_t e = 0; e < experts; ++e) site.top1[e] += top.data_ptr<int64_t>()[e];
    site.rows += probs.size(0);
    add_kept(site, record.weights.detach());
  }
}

Json RoutingStats::sums() const { return owners_; }

void RoutingStats::add(const Json& sums) {
  for (const auto& [owner, sites] : sums.get<std::map<std::string, Sites>>()) {
    for (const auto& [name, other] : sites) {
      const auto [known, is_new] = owners_[owner].try_emplace(name, other);
      if (is_new) continue;
      SiteRouting& site = known->second;
      site.rows += other.rows;
      site.entropy_sum += other.entropy_sum;
      for (size_t e = 0; e < site.top1.size(); ++e) site.top1[e] += other.top1[e];
      add_to(site.prob_sum, other.prob_sum);
      add_to(site.prob_square_sum, other.prob_square_sum);
      add_to(site.weight_sum, other.weight_sum);
      add_to(site.kept, other.kept);
      add_to(site.together, other.together);
    }
  }
}

OrderedJson RoutingStats::json() const {
  OrderedJson result = OrderedJson::object();
  for (const auto& [owner, sites] : owners_) {
    for (const auto& [name, site] : sites) {
      std::vector<double> mean, deviation, share;
      for (int64_t e = 0; e < site.experts(); ++e) {
        const double m = site.mean_prob(e);
        mean.push_back(rounded(m));
        deviation.push_back(
            rounded(std::sqrt(std::max(0.0, site.prob_square_sum[e] / static_cast<double>(site.rows) - m * m))));
        share.push_back(rounded(static_cast<double>(site.top1[e]) / static_cast<double>(site.rows)));
      }
      result[owner][name] = {{"layer", site.layer},
                             {"rows", site.rows},
                             {"mean_prob", mean},
                             {"prob_std", deviation},
                             {"top1_share", share},
                             {"entropy", rounded(site.entropy())},
                             {"entropy_share", rounded(site.entropy_share())},
                             {"max_load", rounded(site.max_load())}};
      result[owner][name].update(site.kept_json());
    }
  }
  return result;
}

Json RoutingStats::summary() const {
  Means all;
  std::map<std::pair<std::string, int64_t>, Means> layers;
  for (const auto& [owner, sites] : owners_) {
    for (const auto& [name, site] : sites) {
      all.add(site);
      layers[{owner, site.layer}].add(site);
    }
  }
  Json result = all.json();
  for (const auto& [place, means] : layers) {
    Json row = means.json();
    row["owner"] = place.first;
    row["layer"] = place.second;
    result["layers"].push_back(row);
  }
  return result;
}

std::pair<double, std::string> RoutingStats::largest_load() const {
  std::pair<double, std::string> largest{0.0, ""};
  for (const auto& [owner, sites] : owners_) {
    for (const auto& [name, site] : sites) {
      largest = std::max(largest, {site.max_load(), owner.empty() ? name : owner + " " + name});
    }
  }
  return largest;
}

double routing_similarity(const RoutingStats& a, const RoutingStats& b) {
  double dot = 0, square_a = 0, square_b = 0;
  for (const auto& [owner, sites] : a.owners()) {
    const auto others = b.owners().find(owner);
    if (others == b.owners().end()) continue;
    for (const auto& [name, site] : sites) {
      const auto other = others->second.find(name);
      if (other == others->second.end()) continue;
      MOESAIC_CHECK(other->second.experts() == site.experts(), DataError,
                    "routing statistics of {} at {}: got {} and {} experts, expected equal numbers", owner, name,
                    site.experts(), other->second.experts());
      for (int64_t e = 0; e < site.experts(); ++e) {
        const double p = site.mean_prob(e), q = other->second.mean_prob(e);
        dot += p * q;
        square_a += p * p;
        square_b += q * q;
      }
    }
  }
  return square_a * square_b > 0 ? dot / std::sqrt(square_a * square_b) : 0.0;
}

double task_information(const std::vector<RoutingStats>& tasks) {
  if (tasks.size() < 2) return std::nan("");
  double sum = 0;
  int64_t routers = 0;
  for (const auto& [owner, sites] : tasks[0].owners()) {
    for (const auto& [name, site] : sites) {
      const int64_t experts = site.experts();
      std::vector<const SiteRouting*> same;
      for (const RoutingStats& task : tasks) {
        const auto of_owner = task.owners().find(owner);
        if (of_owner == task.owners().end() || !of_owner->second.contains(name)) break;
        same.push_back(&of_owner->second.at(name));
        MOESAIC_CHECK(same.back()->experts() == experts, DataError,
                      "routing statistics of {} at {}: got {} and {} experts, expected equal numbers", owner, name,
                      experts, same.back()->experts());
      }
      if (same.size() < tasks.size() || experts < 2) continue;
      double divergence = 0;
      for (int64_t e = 0; e < experts; ++e) {
        double mean = 0;
        for (const SiteRouting* task : same) mean += task->mean_prob(e) / static_cast<double>(same.size());
        for (const SiteRouting* task : same) {
          const double p = task->mean_prob(e);
          if (p > 0) divergence += p * std::log(p / mean);
        }
      }
      sum += divergence / static_cast<double>(same.size()) /
             std::log(static_cast<double>(std::min<int64_t>(experts, std::ssize(same))));
      ++routers;
    }
  }
  return routers > 0 ? sum / static_cast<double>(routers) : std::nan("");
}

}  // namespace moesaic::moe
