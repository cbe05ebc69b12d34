#include "moesaic/eval/routing_stats.h"

#include <algorithm>
#include <cmath>

namespace moesaic::eval {

void RoutingStats::add(const std::vector<nn::RoutingRecord>& records) {
  torch::NoGradGuard no_grad;
  for (const nn::RoutingRecord& record : records) {
    SiteRouting& site = sites_[record.site];
    const torch::Tensor probs = record.probs.detach();
    const int64_t experts = probs.size(1);
    if (site.prob_sum.empty()) {
      site.layer = record.layer;
      site.prob_sum.assign(experts, 0.0);
      site.prob_square_sum.assign(experts, 0.0);
      site.top1.assign(experts, 0);
    }
    auto add_to = [](std::vector<double>& sums, const torch::Tensor& values) {
      const torch::Tensor row = values.to(torch::kCPU, torch::kFloat64).contiguous();
      for (size_t e = 0; e < sums.size(); ++e) sums[e] += row.data_ptr<double>()[e];
    };
    add_to(site.prob_sum, probs.sum(0, false, torch::kFloat64));
    add_to(site.prob_square_sum, probs.square().sum(0, false, torch::kFloat64));
    // p ln p -> 0 for p -> 0
    site.entropy_sum -= torch::xlogy(probs, probs).sum(torch::kFloat64).item<double>();
    const torch::Tensor top = probs.argmax(1).bincount({}, experts).to(torch::kCPU).contiguous();
    for (int64_t e = 0; e < experts; ++e) site.top1[e] += top.data_ptr<int64_t>()[e];
    site.rows += probs.size(0);
  }
}

OrderedJson RoutingStats::json() const {
  OrderedJson result = OrderedJson::object();
  for (const auto& [name, site] : sites_) {
    std::vector<double> mean, deviation, share;
    for (int64_t e = 0; e < site.experts(); ++e) {
      const double m = site.mean_prob(e);
      mean.push_back(m);
      deviation.push_back(std::sqrt(std::max(0.0, site.prob_square_sum[e] / static_cast<double>(site.rows) - m * m)));
      share.push_back(static_cast<double>(site.top1[e]) / static_cast<double>(site.rows));
    }
    result[name] = {{"layer", site.layer},
                    {"rows", site.rows},
                    {"mean_prob", mean},
                    {"prob_std", deviation},
                    {"top1_share", share},
                    {"entropy", site.entropy()},
                    {"max_share", *std::max_element(share.begin(), share.end())}};
  }
  return result;
}

double routing_similarity(const RoutingStats& a, const RoutingStats& b) {
  double dot = 0, square_a = 0, square_b = 0;
  MOESAIC_CHECK(a.sites().size() == b.sites().size(), DataError, "routing statistics of different sites: {} and {}",
                a.sites().size(), b.sites().size());
  for (const auto& [name, site] : a.sites()) {
    const auto other = b.sites().find(name);
    MOESAIC_CHECK(other != b.sites().end() && other->second.experts() == site.experts(), DataError,
                  "routing statistics of different sites: '{}' differs", name);
    for (int64_t e = 0; e < site.experts(); ++e) {
      const double p = site.mean_prob(e), q = other->second.mean_prob(e);
      dot += p * q;
      square_a += p * p;
      square_b += q * q;
    }
  }
  return dot / std::sqrt(square_a * square_b);
}

}  // namespace moesaic::eval
