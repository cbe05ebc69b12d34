#include "moesaic/train/router_log.h"

namespace moesaic::train {

void RouterLog::add(const std::vector<nn::RoutingRecord>& records) {
  torch::NoGradGuard no_grad;
  for (const auto& record : records) {
    Site& site = sites_[record.site];
    const auto probs = record.probs.detach().to(torch::kCPU, torch::kFloat64);
    site.layer = record.layer;
    site.rows += probs.size(0);
    site.entropy -= at::xlogy(probs, probs).sum().item<double>() / std::log(static_cast<double>(probs.size(1)));
    const auto loads = record.weights.detach().to(torch::kCPU, torch::kFloat64).sum(0);
    site.loads = site.loads.defined() ? site.loads + loads : loads;
  }
}

std::pair<double, std::string> RouterLog::largest_share() const {
  std::pair<double, std::string> largest{0.0, ""};
  for (const auto& [name, site] : sites_) {
    largest = std::max(largest, {(site.loads / site.loads.sum()).max().item<double>(), name});
  }
  return largest;
}

Json RouterLog::summary() const {
  struct Sums {
    double entropy = 0, load_cv = 0, max_share = 0;
    int64_t sites = 0;
    Json json() const {
      const double n = static_cast<double>(sites);
      return {{"entropy", entropy / n}, {"load_cv", load_cv / n}, {"max_share", max_share}};
    }
  };
  Sums all;
  std::map<int64_t, Sums> layers;
  for (const auto& [name, site] : sites_) {
    const auto shares = site.loads / site.loads.sum();
    const double load_cv = (shares.std(/*unbiased=*/false) / shares.mean()).item<double>();
    for (Sums* sums : {&all, &layers[site.layer]}) {
      sums->entropy += site.entropy / static_cast<double>(site.rows);
      sums->load_cv += load_cv;
      sums->max_share = std::max(sums->max_share, shares.max().item<double>());
      ++sums->sites;
    }
  }
  Json result = all.json();
  for (const auto& [layer, sums] : layers) {
    Json row = sums.json();
    row["layer"] = layer;
    result["layers"].push_back(row);
  }
  return result;
}

}  // namespace moesaic::train
