// Counters and histograms in Prometheus' text format.
#pragma once
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace moesaic::serve {

/// A gauge as it stands when it is asked for.
struct Gauge {
  std::string name, help;
  double value;
  std::string labels{};  // model="sql"
};

/// Safe to share between threads. Names under which vLLM's dashboards look are theirs; docs/serve.md lists all.
class Metrics {
 public:
  /// labels: name="value", comma between several.
  void count(const std::string& name, double by = 1, const std::string& labels = "");
  void observe(const std::string& name, double value);
  /// Everything, with gauges behind it.
  std::string text(const std::vector<Gauge>& gauges) const;

 private:
  struct Histogram {
    std::vector<int64_t> counts;
    double sum = 0;
    int64_t total = 0;
  };
  mutable std::mutex mutex_;
  std::map<std::string, std::map<std::string, double>> counters_;
  std::map<std::string, Histogram> histograms_;
};

}  // namespace moesaic::serve
