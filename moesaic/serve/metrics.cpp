#include "moesaic/serve/metrics.h"

#include <fmt/format.h>

#include <algorithm>

namespace moesaic::serve {
namespace {

struct Known {
  const char* name;
  const char* help;
  std::vector<double> bounds;  // of a histogram
};

const std::vector<double> kSeconds{0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300};
const std::vector<double> kTokens{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};

const std::vector<Known>& known() {
  static const std::vector<Known> all{
      {"vllm:prompt_tokens_total", "Tokens of prompts that were answered", {}},
      {"vllm:prompt_tokens_cached_total", "Of them, those that had been read before", {}},
      {"vllm:generation_tokens_total", "Tokens of answers", {}},
      {"vllm:request_success_total", "Answers that came to their end", {}},
      {"vllm:prefix_cache_queries_total", "Prompt tokens looked for among what was read before", {}},
      {"vllm:prefix_cache_hits_total", "Prompt tokens found there", {}},
      {"vllm:admission_rejections_total", "Requests that were not taken", {}},
      {"moesaic:mixture_requests_total", "Requests by model", {}},
      {"moesaic:cancelled_total", "Requests whose client left", {}},
      {"moesaic:slow_readers_total", "Streams whose client did not keep up", {}},
      {"moesaic:unknown_fields_total", "Fields of requests that this server does not know", {}},
      {"vllm:time_to_first_token_seconds", "From a request to its first token", kSeconds},
      {"vllm:inter_token_latency_seconds", "Between two tokens of an answer", kSeconds},
      {"vllm:e2e_request_latency_seconds", "From a request to its end", kSeconds},
      {"vllm:request_prompt_tokens", "Tokens of a prompt", kTokens},
      {"vllm:request_generation_tokens", "Tokens of an answer", kTokens},
      {"moesaic:adapter_load_seconds", "Loading an adapter", kSeconds},
  };
  return all;
}

const Known& of(const std::string& name) {
  return *std::find_if(known().begin(), known().end(), [&](const Known& each) { return each.name == name; });
}

std::string line(const std::string& name, const std::string& labels, double value) {
  return fmt::format("{}{} {}\n", name, labels.empty() ? "" : "{" + labels + "}", value);
}

}  // namespace

void Metrics::count(const std::string& name, double by, const std::string& labels) {
  const std::lock_guard lock(mutex_);
  counters_[name][labels] += by;
}

void Metrics::observe(const std::string& name, double value) {
  const std::vector<double>& bounds = of(name).bounds;
  const std::lock_guard lock(mutex_);
  Histogram& histogram = histograms_[name];
  histogram.counts.resize(bounds.size());
  for (size_t i = 0; i < bounds.size(); ++i) histogram.counts[i] += value <= bounds[i] ? 1 : 0;
  histogram.sum += value;
  ++histogram.total;
}

std::string Metrics::text(const std::vector<Gauge>& gauges) const {
  const std::lock_guard lock(mutex_);
  std::string text;
  auto head = [&](const std::string& name, const std::string& help, const char* type) {
    text += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
  };
  for (const Known& each : known()) {
    const std::string name = each.name;
    if (each.bounds.empty()) {
      head(name, each.help, "counter");
      const auto found = counters_.find(name);
      if (found == counters_.end()) text += line(name, "", 0);
      for (const auto& [labels, value] : found == counters_.end() ? decltype(found->second)() : found->second) {
        text += line(name, labels, value);
      }
      continue;
    }
    head(name, each.help, "histogram");
    const auto found = histograms_.find(name);
    const Histogram histogram = found == histograms_.end() ? Histogram{} : found->second;
    for (size_t i = 0; i < each.bounds.size(); ++i) {
      const auto count = histogram.counts.empty() ? 0 : histogram.counts[i];
      text += line(name + "_bucket", fmt::format("le=\"{}\"", each.bounds[i]), static_cast<double>(count));
    }
    text += line(name + "_bucket", "le=\"+Inf\"", static_cast<double>(histogram.total));
    text += line(name + "_sum", "", histogram.sum);
    text += line(name + "_count", "", static_cast<double>(histogram.total));
  }
  std::string last;
  for (const Gauge& gauge : gauges) {
    if (gauge.name != last) head(gauge.name, gauge.help, "gauge");
    last = gauge.name;
    text += line(gauge.name, gauge.labels, gauge.value);
  }
  return text;
}

}  // namespace moesaic::serve
